"""What several benchmarks measure, and how."""
import time
from pathlib import Path


def take_turns(work, repeats, device="cpu"):
    """How long functions take that are called in turn: name -> seconds of each of `repeats` turns.

    work: name -> function.  A turn before these, in which everything starts, does not count.
    """
    times = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, function in work.items():
            times[name].append(seconds(function, device))
    return {name: values[1:] for name, values in times.items()}


def seconds(work, device="cpu"):
    import torch

    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def relative_error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def peak_memory(pid="self"):
    """MiB; Linux.  Unlike getrusage's ru_maxrss, it leaves out what the parent held when it started the process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
