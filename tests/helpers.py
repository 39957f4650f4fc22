"""Runs of the scripts in processes of their own, and what tests make, read and compare of them.

Processes are forked from a server that has already loaded torch, and can really be killed.
"""
import contextlib
import gc
import io
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from datetime import timedelta
from functools import cache, partial
from multiprocessing import get_context, resource_tracker
from pathlib import Path

import numpy as np
import torch
from torch.distributed import TCPStore

from datasets import loading

ROOT = Path(__file__).parent.parent
FLAGS = ["--dataset", "digits", "--num-label", "50", "-a", "convsmall", "--batch-size", "8", "--warmup", "2", "--seed", "1",
         "--milestones", "5", "--mix-up", "--print-freq", "1"]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload([
    "helpers", "train_meta", "plot_features", "torch", "torch._dynamo", "torch._decomp.decompositions_for_jvp",
    "torch.distributed", "torch.utils.serialization.config", "tensorboardX", "datasets.batches", "metasemi",
    "models.convlarge", "models.synchronized", "utils.evaluation", "utils.run_folder", "reproduction.features",
    "pytest", "hypothesis"])
DIGITS = loading.load_digits()         # read once, by the server for all its runs


# Runs

def few_digits(*args, **options):
    """The digits with the first 100 of their 500 test images: evaluating all takes a third of a run of seven steps."""
    return DIGITS._replace(train_images=DIGITS.train_images.clone(), train_labels=DIGITS.train_labels.clone(),
                           test_images=DIGITS.test_images[:100].clone(), test_labels=DIGITS.test_labels[:100].clone())


def start(flags, *patches, script="train_meta", output=None):
    """A process, in a process group of its own, that applies the patches and then runs a script's main(flags)."""
    process = SERVER.Process(target=child, args=([str(flag) for flag in flags], patches, script, output), daemon=False)
    process.start()
    with contextlib.suppress(ProcessLookupError):
        while os.getpgid(process.pid) != process.pid:
            time.sleep(0.001)
    return process


def child(flags, patches, script, output):
    os.setpgid(0, 0)
    gc.freeze()             # what the server loaded is no garbage, and looking for some would copy its pages
    signal.signal(signal.SIGHUP, signal.SIG_DFL)            # under nohup it would be ignored
    resource_tracker.register = resource_tracker.unregister = lambda *args: None      # it would name what the killed leave
    if output:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    loading.LOADERS["digits"] = few_digits
    for patch in filter(None, patches):
        patch()
    try:
        sys.exit(__import__(script).main(flags))
    finally:
        for thread in threading.enumerate():            # as in a process of its own; multiprocessing would end queues before
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()


def on_terminal(name, *numbers):
    """Makes a terminal of some standard streams."""
    for number in numbers:
        os.dup2(os.open(name, os.O_RDWR | os.O_NOCTTY), number)


def run(folder, flags, *patches, script="train_meta"):
    """Runs to the end; returns exit code, standard output and standard error."""
    output = folder / "output"
    process = start(flags, *patches, script=script, output=output)
    code = finish(process)
    return code, Path(f"{output}.out").read_text(), Path(f"{output}.err").read_text()


@cache
def whole(*flags):
    """The folder of an uninterrupted run with these flags, made once; as long as the process lives."""
    folder = tempfile.TemporaryDirectory()
    WHOLE.append(folder)
    code, _, error = run(Path(folder.name), [*flags, "--save-path", Path(folder.name, "run")])
    assert code == 0, error
    return Path(folder.name, "run")


WHOLE = []          # what `whole` made


def finish(process, seconds=600):
    """The exit code; a process that does not end is killed, and named."""
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return "it did not end"
    return process.exitcode


# Several processes of one run, in the environment that torchrun would give them

def make_store():
    """What torchrun keeps for its processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=10))


def become(rank, size, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")


class Processes:
    """train_meta.py in several processes, one for each list of flags.

    `end` gives their exit codes, and what each wrote to standard error; it ends the others once one has failed, as torchrun
    does.
    """

    def __init__(self, store, folder, flags, *patches):
        self.outputs = [folder / f"rank{rank}" for rank in range(len(flags))]
        for output in self.outputs:         # one that is ended at once does not make its own
            Path(f"{output}.err").write_text("")
        self.processes = [start(own, partial(become, rank, len(flags), store.port), *patches, output=output)
                          for rank, (own, output) in enumerate(zip(flags, self.outputs))]

    def end(self):
        while {process.exitcode for process in self.processes} in ({None}, {0, None}):
            time.sleep(0.02)
        for process in self.processes:
            process.terminate()
        codes = [finish(process) for process in self.processes]
        return codes, [Path(f"{output}.err").read_text() for output in self.outputs]


def run_processes(folder, flags, *patches):
    """A run from its start to its end, with a store of its own: exit codes, and what all wrote to standard error."""
    store = make_store()
    codes, errors = Processes(store, folder, flags, *patches).end()
    del store
    return codes, "".join(errors)


def one_line(code, expected, error, *parts):
    """What is wrong with the end of a failed run, or None."""
    if code != expected or error.count("\n") != 1:
        return f"exit code {code}: {error[-300:]!r}"
    return next((f"{part!r} is not in {error!r}" for part in parts if part not in error), None)


def state_of(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def tensors(value, path=""):
    """path -> tensor, of everything in a checkpoint."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, item in items for k, v in tensors(item, f"{path}/{key}").items()}


def contents(folder):
    """name -> bytes of the files of a run folder, but for its lock."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def differing(folder, other, name="checkpoint.pth"):
    """Names of the tensors in which the checkpoints of two run folders differ."""
    a, b = (tensors(torch.load(f / name, weights_only=True)) for f in (folder, other))
    assert a.keys() == b.keys() and len(a) > 40
    return [key for key in a if not torch.equal(a[key], b[key])]


def unequal(folder, other, name="checkpoint.pth"):
    changed = differing(folder, other, name)
    return f"{len(changed)} tensors of {name} differ from the uninterrupted run" if changed else None


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def slow_disk(pause=0.02, chunks=8):
    """Saving takes 160 ms, so that a random moment often falls into it."""
    save = torch.save

    def slow(state, file):
        buffer = io.BytesIO()
        save(state, buffer)
        data = buffer.getvalue()
        with contextlib.ExitStack() as stack:
            out = file if hasattr(file, "write") else stack.enter_context(open(file, "wb"))
            for i in range(0, len(data), len(data) // chunks):
                out.write(data[i:i + len(data) // chunks])
                out.flush()
                time.sleep(pause)
    torch.save = slow


class Malicious:
    """Unpickled, it writes a file named pwned in the working folder."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def orphans(group, seconds=600):
    """What is left of a process group after a while, or None as soon as nothing is."""
    deadline = time.monotonic() + seconds
    while True:
        left = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, its_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
                if int(its_group) == group and state != "Z":
                    left.append(stat.parent.name)
        if not left or time.monotonic() > deadline:
            return f"processes {left} are left" if left else None
        time.sleep(0.05)


def wait_for(path, text, process):
    """Until a process has said so, or has ended."""
    while process.is_alive() and not (path.exists() and text in path.read_text()):
        time.sleep(0.01)


def finished_run(row, seed=1):
    """What a finished run of a row of digits at scale 0.01 leaves, in the folder where reproduce.py looks; that folder."""
    from reproduction.cells import training_flags
    from reproduction.run import Run, resolved

    folder = Run("digits", row, seed, 0.01).folder
    folder.mkdir(parents=True)
    results = {"error_rate": {"last": 5.0, "median_last_20": 6.0, "best_validation": None, "best_test": 4.0},
               "labeled_error_rate": 1.25, "steps": 8, "seconds": 3.4,
               "args": resolved(*training_flags("digits", row, seed, 0.01)),
               "sessions": [{"device": "cpu", "threads": 2, "precision": "float32", "torch": "2", "commit": "0" * 40}]}
    lines = [{"step": s, "train/unlabel-acc": s / 20, "train/pseudo-acc": s / 10} for s in range(1, 9)]
    lines += [{"step": 6, "test/accuracy": 0.75}, {"step": 8, "test/accuracy": 0.95}]
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "args.json").write_text(json.dumps({"args": results["args"]}), encoding="utf-8")
    (folder / "label_indices.txt").write_text(f"{seed}\n", encoding="utf-8")
    return folder


def few_images(root, count=4, seed=0, classes=("ant", "bee")):
    """Noise as image files, for --dataset folder: two seeds give other images of the same names and sizes."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / part / name / f"{i}.bmp")
    return root


FEW = ["--dataset", "folder", "--image-size", "16", "--num-label", "4", "--num-workers", "0", "--batch-size", "4"]
