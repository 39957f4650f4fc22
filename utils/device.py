"""The device a program runs on, the precision of its arithmetic, and what bitwise equality of results depends on."""
import os
import platform
import re
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from utils.cli import UsageError

BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")      # instructions of x86, and of ARM


def choose_device(name):
    """"auto" is CUDA if there is one (CUDA_VISIBLE_DEVICES is respected), else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("argument --device: cuda: no CUDA device is visible; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def set_precision(precision, device):
    """Sets the arithmetic of float32 tensors; returns the type for autocast, or None."""
    if precision == "tf32" and device.type != "cuda":
        raise UsageError("argument --precision: tf32 exists on CUDA only; use float32 or bfloat16")
    mode = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = mode
    torch.backends.cudnn.conv.fp32_precision = mode     # by default cuDNN would round float32 convolutions to TF32
    torch.backends.cudnn.benchmark = True
    return torch.bfloat16 if precision == "bfloat16" else None


def slow_precision(precision, device):
    """Why a precision is slower than float32 on this CPU, in one line, or None."""
    if precision != "bfloat16" or device.type != "cpu" or any(map(torch.cpu.get_capabilities().get, BFLOAT16)):
        return None
    return ("warning: --precision bfloat16 is slow here: this CPU has no bfloat16 instructions, so torch imitates them "
            "(on a CPU with AVX2 a step of convlarge took 8 to 9 times as long as in float32); take float32")


def check_compiler():
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UsageError("argument --compile: no C++ compiler is found; install g++, or leave it out")


def memory_for_images(device):
    """Bytes that the images of a set may take: a third of what is free on the GPU, and on the machine, where loading holds
    them twice and torchrun's processes share."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        free += [1024 * int(size) for size in re.findall(r"MemAvailable:\s+(\d+)", text)]
    with suppress(OSError, ValueError):                 # of a container; "max" is none
        free.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    shared = min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(shared, torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else shared) // 3


def fingerprint(device, precision, compiled, processes):
    """Two parts of a run are equal bit for bit only where all of these agree."""
    if device.type == "cuda":
        name = f"cuda: {torch.cuda.get_device_name(device)}, cuDNN {torch.backends.cudnn.version()}"
    else:
        name = f"cpu: {platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    name += f", {processes} processes" * (processes > 1)
    return {"device": name, "threads": torch.get_num_threads(), "precision": precision + ", compiled" * compiled,
            "python": platform.python_version(), "torch": str(torch.__version__),
            **{package: version(package) for package in ("torchvision", "numpy")}}
