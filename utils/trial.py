"""A trial of a network of the user's own: what would make a run wrong, or its checkpoint useless, is said before it starts.

A trial has instances of its own.  It leaves random states as they were, and keeps nothing.
"""
import io
import random
import re
from contextlib import contextmanager

import numpy as np
import torch

import metasemi
from datasets import DataError
from metasemi.check import check_passes, same
from models import NetworkError, build_model, is_custom
from models.custom import place_in, where
from utils.errors import Diverged, RunFailure, UsageError, is_out_of_memory
from utils.state import find_misfit


def try_network(name, num_classes, image_size, device, dtype=None, method=None, consistency="mse", epsilon=1e-2, batch=4,
                trains=True):
    """Tries a network on a few random images; networks of this repository only with a batch of one image.

    Args:
        device, dtype: where it is to run, and the type for autocast or None.
        method, consistency, epsilon: of the meta-gradient, as in `metasemi.training_step`; a method of None: no meta step.
        batch: how many images, those of a step if that has fewer than four.
        trains: whether it is to be trained; if not, it is only to give logits.

    Returns warnings, a list of lines.

    Raises NetworkError if forward(x) does not give logits (B, K) in both modes or changes x, if `metasemi.check_model` finds
    the meta-gradient wrong, or if a fresh network with the weights of a trained one does not do the same.
    """
    if not is_custom(name) and batch > 1:
        return []
    kept = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
            seed(1)
            x_l, x_u = torch.randn(2, batch, 3, image_size, image_size, device=device)
            y_l = torch.arange(batch, device=device) % num_classes
            model = build_model(name, num_classes, device)
            warnings = check_answers(name, model, x_l, num_classes, dtype)
            if is_custom(name) and trains:
                check_method(name, model, x_l, y_l, x_u, method, consistency, epsilon)
                row = {"meta": method is not None, "method": method or "jvp", "consistency": consistency, "epsilon": epsilon}
                warnings += check_training(name, model, build_model(name, num_classes, device), x_l, y_l, x_u, dtype, row)
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
    return warnings


def seed(number):
    """Seeds all generators on which a network may draw."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


@contextmanager
def told(name, what, remedy=""):
    """Makes one line of whatever is raised inside, a NetworkError: `what` failed, where, and the remedy."""
    try:
        yield
    except (Exception, SystemExit) as error:
        remedy = ": take a larger --batch-size" if "1 value per channel" in str(error) else remedy
        raise NetworkError(f"{name} fails {what}: {where(error, name)}{remedy}") from None


@torch.no_grad()
def answer(network, x, dtype, number):
    """Returns what a network gives for x, with the random numbers of a seed."""
    seed(number)
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        return network(x)


def check_answers(name, model, images, num_classes, dtype):
    """Returns warnings; raises NetworkError unless parameters are dense and real, and forward(x) gives logits (B, K) and leaves
    x as it was."""
    for key, w in model.named_parameters():
        if w.is_complex() or w.layout != torch.strided:
            raise NetworkError(f"{name} has the {'complex' if w.is_complex() else 'sparse'} parameter {key}: "
                               "keep it as a dense real one")
    warnings, shape = [], (len(images), num_classes)
    for mode in ("evaluation", "training"):
        x = images.clone()
        with told(name, f"in {mode} mode on images {tuple(x.shape)}"):
            logits = answer(model.train(mode == "training"), x, dtype, 2)
        if not isinstance(logits, torch.Tensor) or logits.shape != shape or not logits.is_floating_point():
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
            raise NetworkError(f"{name} gives {got} in {mode} mode for {len(x)} images: expected logits of shape {shape}")
        if not torch.equal(x, images):
            raise NetworkError(f"{name} changes its input in {mode} mode, which other passes see, too: let its first operation "
                               "not be in place")
        if not warnings and (logits >= 0).all() and ((logits.float().sum(dim=1) - 1).abs() < 1e-2).all():
            warnings.append(f"warning: {name} gives probabilities, rows in [0, 1] that sum to one: the losses take logits, so "
                            "leave its softmax out")
    return warnings


def check_method(name, model, x_l, y_l, x_u, method, consistency, epsilon):
    """Raises NetworkError unless the meta-gradient of a model is right, or without a method its passes in evaluation mode."""
    with told(name, "in the check of its meta-gradient"):
        try:
            if method:
                metasemi.check_model(model, x_l, y_l, x_u, method=method, consistency=consistency, epsilon=epsilon)
            else:
                check_passes(model, x_l)
            return
        except ValueError as error:
            if place_in(error, name):
                raise
            said = re.sub("method='([a-z-]+)'$", r"--meta-gradient \1", str(error))
    raise NetworkError(f"{name}: {said}")


def check_training(name, model, fresh, x_l, y_l, x_u, dtype, row):
    """Trains a model for two steps, and puts its weights into a fresh one by way of a file; returns warnings.

    Raises NetworkError unless that works, train(mode) leaves the weights alone, and the two then give the same logits.
    """
    seed(3)
    drawn, file = foreign_state(), io.BytesIO()
    with told(name, "in a step of training", ": take --precision float32" if dtype else ""):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        for _ in range(2):
            metasemi.training_step(model, optimizer, x_l, y_l, x_u, alpha=0.01, beta=0.01, dtype=dtype, **row)
    warnings = [] if foreign_state() == drawn else [
        f"warning: {name} draws random numbers from Python or NumPy: a resumed run continues with those of torch alone"]
    with told(name, "when it is saved and loaded"):
        torch.save(model.state_dict(), file)
        file.seek(0)
        weights = torch.load(file, map_location=x_l.device, weights_only=True)
    if odd := [key for key, value in weights.items() if not isinstance(value, torch.Tensor)]:
        raise NetworkError(f"{name} has the extra state {odd[0]}: a checkpoint keeps tensors alone, so make it a buffer")
    for training in (False, True):
        state = model.train(training).state_dict()
        if changed := [key for key, w in weights.items() if key not in state or not same(state[key], w)]:
            raise NetworkError(f"{name} changes {changed[0]} when train({training}) is called, so that weights which are saved "
                               "in one mode are wrong in the other: let modes leave them as they are")
    own = fresh.state_dict()
    try:
        fresh.load_state_dict(weights)
    except Exception as error:
        misfit = find_misfit(own, weights) or " ".join(str(error).split())
        raise NetworkError(f"{name} cannot load the weights of a run ({misfit}): make every parameter and buffer in __init__, "
                           "in its final shape") from None
    for mode in ("evaluation", "training"):
        with told(name, f"in {mode} mode once it was saved and loaded"):
            # Another seed than at the first pass of the model: what it drew there is to be something else in the fresh one.
            a, b = (answer(network.train(mode == "training"), x_u, dtype, 4) for network in (model, fresh))
        if not same(a, b, 0 if x_u.device.type == "cpu" else 1e-2):
            raise NetworkError(f"{name} gives other logits in {mode} mode once it was saved and loaded, so no run could be "
                               "resumed: keep what training changes in its state_dict()")
    return warnings


def foreign_state():
    """Returns the state of the random number generators of Python and NumPy."""
    return random.getstate(), np.random.get_state()[2:]


@contextmanager
def network_failures(name, step=None):
    """Makes a RunFailure of what the custom network `name` raises inside; errors of the data, the memory, the other
    processes or a network of this repository stay what they are, and so do logits that are not finite."""
    try:
        yield
    except Exception as error:
        others = isinstance(error, (DataError, Diverged, NetworkError, RunFailure, UsageError))
        if not is_custom(name) or others or is_out_of_memory(error) or isinstance(error, OSError) and not place_in(error, name):
            raise
        at = "" if step is None else f" at step {step}"
        raise RunFailure(f"{name} fails{at}: {where(error, name)}") from error
