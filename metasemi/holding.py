"""Holds a model as it is, with all that its modules reach, and puts it back."""
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def as_it_was(model: nn.Module, device: torch.device, others: Iterable[Tensor] = ()) -> Iterator[None]:
    """Puts a model back whatever happens inside: values of tensors, bit for bit, modes, modules and attributes, and the random
    number generators of the CPU and the device.

    Of what modules hold, modules and containers are followed, other objects not: others are tensors that only they reach.
    """
    tensors, containers = held(model)
    values = [(t, t.detach().clone()) for t in [*tensors, *others]]
    copies = [(container, container.copy()) for container in containers]
    random = random_state(device)
    try:
        yield
    finally:
        for container, copy in copies:
            container.clear()
            (container.update if isinstance(container, dict | set) else container.extend)(copy)
        for t, value in values:
            if not torch.equal(t, value):
                t.data.copy_(value)
        set_random_state(device, random)


@contextmanager
def in_type(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Gives all floating-point tensors of a model, and those that it makes, another type inside.  They stay the same objects,
    and what shared memory still does."""
    default, before = torch.get_default_dtype(), [(t, t.data, t.grad) for t in held(model)[0] if t.is_leaf]
    memory: dict[int, Tensor] = {}
    try:
        for t, data, _ in before if dtype else []:
            if data.is_floating_point():
                whole = torch.empty(0, dtype=data.dtype, device=data.device).set_(data.untyped_storage())
                moved = memory.setdefault(whole.data_ptr(), whole.to(dtype)) if len(whole) else whole.to(dtype)
                t.grad = None
                t.data = moved.as_strided(data.shape, data.stride(), data.storage_offset())
        torch.set_default_dtype(dtype or default)
        yield
    finally:
        torch.set_default_dtype(default)
        for t, data, grad in before:
            t.data = data
            t.grad = grad


def held(model: nn.Module) -> tuple[list[Tensor], list]:
    """Returns the tensors and the changeable containers that a model reaches through attributes and containers, each once."""
    tensors: list[Tensor] = []
    containers: list = []
    seen: set[int] = set()
    todo: list = [model]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, nn.Module):
            todo.append(vars(value))
        elif isinstance(value, dict | set | list | deque):
            containers.append(value)
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple | frozenset):
            todo += value
    return tensors, containers


def random_state(device: torch.device) -> list[Tensor]:
    """Returns the states of the random number generators of the CPU and of a device."""
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *own]


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    """Undoes what has been drawn since `random_state`."""
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
