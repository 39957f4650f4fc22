"""Peak memory of one process; Linux."""
from pathlib import Path


def peak_memory(pid="self"):
    """MiB.  Unlike getrusage's ru_maxrss, it leaves out what the parent held when it started the process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
