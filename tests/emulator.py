"""A pretended accelerator: on the CPU it shows what a program does to a device that is not the host.

`install()` gives torch the device "emu:0" (PyTorch's PrivateUse1).  Its tensors hold CPU tensors, and every operation runs on
those: results equal the CPU's.  But as on CUDA an operation that mixes host and device fails, the device draws random numbers
from a generator of its own, and `watch()` notes all that keeps the host waiting, with the line of the program:

    device = emulator.install()
    with emulator.watch("/path/of/the/project") as seen:
        ...
    print(seen.waits)

It shows nothing of speed, rounding, lower types, memory, streams, or operations that a real device lacks.  Tested with torch
2.15, of which it uses private parts.
"""
import sys
import threading
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.utils import _foreach_utils
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "emu"
aten = torch.ops.aten
HERE = str(Path(__file__).resolve())

# Operations whose result is a value of the host, or has a size that the host must know.
WAITING = dict.fromkeys(("_local_scalar_dense", "equal"), "scalar to host") | dict.fromkeys(
    ("nonzero", "masked_select", "_unique2", "repeat_interleave", "bincount"), "size of the result")
# Operations that take host tensors by design: copies, and those whose scalar may be a host tensor of no dimensions.
COPYING = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize", "_foreach_copy_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
SCALARS = {"where", "fill_", "masked_fill", "masked_fill_", "_fused_sgd_"} | INDEXING - {"index"}
# Operations that torch would take apart, into an empty tensor and one that resizes it; and the copy inside torch.tensor.
MAKERS = (aten.arange.default, aten.arange.start, aten.arange.start_step, aten.randperm.default, aten.copy_.default)


class Seen:
    """What `watch` notes: waits, Counter of (kind, operation, "file:line"), the innermost line of a file under `root`."""

    def __init__(self, root, forbid):
        self.root, self.forbid, self.waits = str(Path(root).resolve()), forbid, Counter()

    def place(self):
        frame, thread = sys._getframe(1), threading.current_thread() is not threading.main_thread()
        while frame:
            name = frame.f_code.co_filename
            if name.startswith(self.root) and name != HERE and "site-packages" not in name:
                return f"{name[len(self.root):].lstrip('/')}:{frame.f_lineno}"
            frame = frame.f_back
        return "backward" if thread else "elsewhere"


class Device:
    """The module torch.emu, with what torch and programs ask of such modules."""

    def __init__(self):
        self.state = torch.Generator().manual_seed(0).get_state()
        self.watching = []

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_device_name = staticmethod(lambda device=None: "emulated")
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    mem_get_info = staticmethod(lambda device=None: (2 ** 34, 2 ** 34))

    def synchronize(self, device=None):
        self.note("synchronize", "synchronize")

    def manual_seed_all(self, seed):
        self.state = torch.Generator().manual_seed(seed).get_state()

    manual_seed = manual_seed_all

    def get_rng_state(self, device=None):
        return self.state.clone()

    def set_rng_state(self, state, device=None):
        self.state = state.clone()

    @contextmanager
    def generator(self):
        """Inside, random numbers come from the generator of the device."""
        with torch.random.fork_rng(devices=[], device_type="cpu"):
            torch.set_rng_state(self.state)
            yield
            self.state = torch.get_rng_state()

    def note(self, kind, operation):
        for seen in self.watching:
            seen.waits[kind, operation, seen.place()] += 1
            if seen.forbid:
                raise RuntimeError(f"the host waits for the device ({kind}, {operation}) in {seen.place()}")


module = Device()


class EmulatedTensor(torch.Tensor):
    """A tensor on the device "emu:0"; `inner` is the CPU tensor that it stands for."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=f"{NAME}:0")
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):                      # torch's would leave `inner` behind
        if (value.shape, value.stride(), value.dtype) != (self.shape, self.stride(), self.dtype):
            raise NotImplementedError("the emulated device cannot give a tensor data of another shape, layout or type")
        self.inner.data = value.inner

    def tolist(self):                           # torch's refuses subclasses
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):          # torch.save copies to the host, and calls it a host tensor
        module.note("copy to host", "torch.save")
        return self.inner.__reduce_ex__(protocol)


def run(operation, args, kwargs):
    """One operation of torch with device tensors, or one that makes some, on the CPU tensors that they stand for."""
    name, tensors, known = operation._schema.name.removeprefix("aten::"), [], {}
    tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
    target = kwargs.get("device")
    to_host = target is not None and torch.device(target).type == "cpu"
    check(operation, name, tensors, args, kwargs, to_host)

    def inner(tensor):
        on_host = tensor.inner if isinstance(tensor, EmulatedTensor) else tensor
        known[id(on_host)] = tensor
        return on_host

    host_args, host_kwargs = tree_map_only(torch.Tensor, inner, (args, kwargs))
    if target is not None:
        host_kwargs["device"] = torch.device("cpu")
    if name == "_efficientzerotensor":          # of forward mode; its CPU twin could not be written to
        operation = aten.zeros.default
    with module.generator() if torch.Tag.nondeterministic_seeded in operation.tags else nullcontext():
        result = operation(*host_args, **host_kwargs)

    def outer(tensor):
        own = known.get(id(tensor))
        if own is None:
            return tensor if to_host else EmulatedTensor(tensor)
        if own.shape != tensor.shape:
            raise NotImplementedError(f"{name}: the emulated device cannot change the shape of a tensor in place")
        return own

    return tree_map_only(torch.Tensor, outer, result)


def check(operation, name, tensors, args, kwargs, to_host):
    """Raises RuntimeError where CUDA would, for host tensors among device tensors; notes waits."""
    if name in WAITING:
        module.note(WAITING[name], name)
    if name in COPYING:
        note_copy(name, args, kwargs, to_host)
        return
    if name in INDEXING:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                module.note("size of the result", f"{name} by a mask")
            if index is not None and isinstance(args[0], EmulatedTensor) and not isinstance(index, EmulatedTensor):
                module.note("copy to device", f"{name} by host indices")
        # Of host tensors only the indices of a device tensor are taken along.
        tensors = [args[0], *args[2:3]] if isinstance(args[0], EmulatedTensor) else tensors
    host = [t for t in tensors if not isinstance(t, EmulatedTensor)]
    scalars = torch.Tag.pointwise in operation.tags or name in SCALARS or name.startswith("_foreach")
    if any(t.dim() or not scalars for t in host) and (len(host) < len(tensors) or not tensors):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found at least two devices, {NAME}:0 "
                           f"and cpu, shapes {[tuple(t.shape) for t in host]} on the host")


def note_copy(name, args, kwargs, to_host):
    """A copy between host and device waits, unless it comes from pinned memory and is said not to block."""
    lists = name == "_foreach_copy_"
    pairs = zip(*args[:2]) if lists else [(None, args[0]) if name == "_to_copy" else args[:2]]
    quick = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
    for target, source in pairs:
        on_device = not to_host if target is None else isinstance(target, EmulatedTensor)
        if isinstance(source, EmulatedTensor) and not on_device:
            module.note("copy to host", name)
        elif not isinstance(source, EmulatedTensor) and on_device and not (quick and getattr(source, "pinned", False)):
            module.note("copy to device", name)


def pin_memory(tensor, device=None):
    """In place of torch's, which would look for the pinned memory of a real device."""
    pinned = tensor.clone()
    pinned.pinned = True
    return pinned


def install():
    """Makes the device, once a process; returns it.  From then on torch takes it for the accelerator of this machine."""
    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME, module)
        module.fallback = torch.library.Library("_", "IMPL", "PrivateUse1")
        module.fallback.fallback(lambda operation, *args, **kwargs: run(operation, args, kwargs))
        module.makers = torch.library.Library("aten", "IMPL", "PrivateUse1")
        for operation in MAKERS:
            module.makers.impl(operation, lambda *args, operation=operation, **kwargs: run(operation, args, kwargs))
        _foreach_utils._foreach_supported_types.append(EmulatedTensor)
        torch.__future__.set_overwrite_module_params_on_conversion(True)    # modules would swap data else
        torch.accelerator.synchronize = module.synchronize      # torch's has no such hook for a device in Python
        torch.Tensor.pin_memory = pin_memory
        torch.Tensor.is_pinned = lambda tensor, device=None: getattr(tensor, "pinned", False)
    return torch.device(NAME, 0)


@contextmanager
def watch(root=".", forbid=False):
    """Inside, a `Seen` notes what happens to the device; forbid: a wait is a RuntimeError instead."""
    seen = Seen(root, forbid)
    module.watching.append(seen)
    try:
        yield seen
    finally:
        module.watching.remove(seen)
