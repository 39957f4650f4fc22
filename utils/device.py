"""The device a program runs on: which it is, its arithmetic, its random numbers, its memory and its name.

No other file knows kinds of device: elsewhere the question is whether `device.type` is "cpu".
"""
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

from metasemi import holding
from utils.errors import UsageError, first_line

BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")      # instructions of x86, and of ARM


def choose_device(name, local_rank=0):
    """Returns the device of a --device name: "auto" is the accelerator that torch finds, else the CPU.

    local_rank: which process of its run on this machine this one is; each gets an accelerator of its own, which is then also
    torch's current device. Raises UsageError for a device that is not there, or for more processes than accelerators.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "cpu" or (name == "auto" and found is None):
        return torch.device("cpu")
    if found is None or name not in ("auto", found.type):
        raise UsageError(f"argument --device: {name}: {why_missing(name)}; use --device {found.type if found else 'cpu'}")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise UsageError(f"argument --device: this machine has {count} of type {found.type} and more processes than that: give "
                         f"torchrun --nproc-per-node={count} or less, or take --device cpu")
    device = torch.device(found.type, local_rank)
    call(device, "set_device", device)
    return device


def why_missing(name="cuda"):
    """Returns why torch finds no device of a type, in one line; of CUDA in its own words."""
    line = f"no {name.upper()} device is visible to torch {torch.__version__}"
    if name == "cuda":
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            line += f" ({first_line(error).partition('. ')[0]}; README.md says which build needs which driver)"
    return line


def call(device, function, *args, default=None):
    """Returns what a function of torch's module of a device gives, such as torch.cuda; default: where the module lacks it."""
    return getattr(torch.get_device_module(device), function, lambda *args: default)(*args)


def set_precision(precision, device):
    """Sets the arithmetic of float32 tensors; returns the type for autocast, or None.

    float32 forbids TF32 to products, convolutions and recurrent layers alike, whatever was set before.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UsageError("argument --precision: tf32 exists on CUDA only; use float32 or bfloat16")
    # These two switches keep all others of torch consistent; by default cuDNN would round float32 convolutions to TF32.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    return torch.bfloat16 if precision == "bfloat16" else None


def slow_precision(precision, device):
    """Returns why a precision is slower than float32 on this CPU, in one line, or None."""
    has = getattr(torch.cpu, "get_capabilities", None)           # not before torch 2.11
    if precision != "bfloat16" or device.type != "cpu" or has is None or any(map(has().get, BFLOAT16)):
        return None
    return ("warning: --precision bfloat16 is slow here: this CPU has no bfloat16 instructions, so torch imitates them "
            "(on a CPU with AVX2 a step of convlarge took 8 to 9 times as long as in float32); take float32")


def memory_for_images(device):
    """Returns how many bytes the images of a set may take: a third of what is free on the accelerator, and on the machine,
    where loading holds them twice and torchrun's processes share."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        free += [1024 * int(size) for size in re.findall(r"MemAvailable:\s+(\d+)", text)]
    with suppress(OSError, ValueError):                 # of a container; "max" is none
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    shared = min(free) // max(1, int(processes) if processes.isdecimal() else 1)
    return min(shared, call(device, "mem_get_info", device, default=(shared,))[0]) // 3


def get_random_state(device):
    """Returns type of device -> state, a ByteTensor of the host, of the generators of the CPU and then of another device."""
    return dict(zip(("cpu", device.type), holding.random_state(device)))


def set_random_state(states, device):
    """Sets torch's generators to what `get_random_state` returned, perhaps on another device.

    Returns lines about what could not be set: the generator of another type of device, whose numbers do not go on here.
    """
    *_, kind = states
    if kind == device.type:
        holding.set_random_state(device, list(states.values()))
        return []
    torch.set_rng_state(states["cpu"])
    return [f"warning: the random numbers of {kind} do not go on on {device.type}: from here on the run is not what it would "
            "have been there"]


def fingerprint(device, precision, processes):
    """Returns what two parts of a run must have in common, beside the versions of packages, to be equal bit for bit."""
    name = f"{device.type}: {call(device, 'get_device_name', device, default=platform.processor() or platform.machine())}"
    if device.type == "cpu":
        name += f", {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        name += f", cuDNN {torch.backends.cudnn.version()}"
    name += f", {processes} processes" * (processes > 1)
    return {"device": name, "threads": torch.get_num_threads(), "precision": precision, "python": platform.python_version(),
            "torch": str(torch.__version__)}
