"""Time to the end of the first step and peak memory of train_meta.py, at 400 and at 400,000 total steps.

    python3 benchmarks/startup.py [flags of train_meta.py]
"""
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import peak_memory

SCRIPT = Path(__file__).parent.parent / "train_meta.py"
DEFAULT = "--dataset digits --num-label 50 -a convsmall --mix-up --batch-size 64".split()


def main():
    flags = sys.argv[1:] or DEFAULT
    print("| total steps | seconds to the first step | peak memory, MiB |\n|---|---|---|")
    for total in (400, 400_000):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            command = [sys.executable, SCRIPT, *flags, "--total-steps", str(total), "--print-freq", "1", "--save-path", folder]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            for line in process.stdout:
                if line.startswith("step 1/"):
                    break
            seconds = time.perf_counter() - start
            peak = peak_memory(process.pid)
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
            process.wait()
        print(f"| {total} | {seconds:.1f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
