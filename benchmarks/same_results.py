"""Does a change of structure change a result?  Runs a fixed set of small commands, and compares two such sets bit for bit.

    python3 benchmarks/same_results.py record before --checkout ../as-it-was
    python3 benchmarks/same_results.py record after
    python3 benchmarks/same_results.py compare before after

Both sets run on the same machine.  Compared are the files that a run leaves: PARTS of its checkpoints, metrics.jsonl,
results.json, the list of labeled images, predictions and coordinates.
"""
import argparse
import json
import os
import shlex
import signal
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
from measuring import ROOT, make_images, run

INDICES = "label_indices.txt"
SHORT = ("--num-label 50 -a convsmall --batch-size 8 --total-steps 12 --warmup 3 --milestones 8,10 --print-freq 2 "
         "--test-freq 4 --seed 3 --device cpu")
DIGITS = "--dataset digits --mix-up"
TREE = "--image-size 16 --mix-up --num-workers 2 --data-path"
RUNS = {
    "neither": "--dataset digits --no-meta",
    "meta": "--dataset digits",
    "mix-up": f"{DIGITS} --no-meta",
    "both": DIGITS,
    "finite-difference": f"{DIGITS} --meta-gradient finite-difference",
    "unrolled": f"{DIGITS} --meta-gradient unrolled --consistency kl",
    "bfloat16": f"{DIGITS} --precision bfloat16",
    "validation": f"{DIGITS} --num-val 50 --include-labeled --schedule cosine --milestones '[300000, 350000]'",
    "split": f"{DIGITS} --split both/{INDICES} --seed 4",
    "init": f"{DIGITS} --init both/checkpoint.pth --meta-lr 0.05",
    "wideresnet": f"{DIGITS} -a narrow.py:Narrow",
    "memory": f"--dataset folder --flip {TREE} images",
    "unlabeled": f"--dataset folder {TREE} with-unlabeled",
    "disk": f"--dataset folder --flip {TREE} images",
    "imagenet": f"--dataset imagenet {TREE} images",
    "two-processes": DIGITS,
    "sync-bn": f"{DIGITS} --sync-bn",
    "resumed": DIGITS,
    "stopped": f"{DIGITS} --total-steps 100 --print-freq 1 --test-freq 20",
}
PARTS = ("step", "model", "optimizer", "rng", "labeled", "validation", "evaluations", "best", "mean", "std", "class_names")
WITHOUT_MEMORY = """import sys
import utils.device
utils.device.memory_for_images = lambda *args: 0
import train_meta
sys.exit(train_meta.main(sys.argv[1:]))"""
NARROW = """from functools import partial
from models.wideresnet import WideResNet
Narrow = partial(WideResNet, depth=10, widen=1)"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one, two = commands.add_parser("record"), commands.add_parser("compare")
    one.add_argument("folder", type=Path, help="a new one")
    one.add_argument("--checkout", type=Path, default=ROOT, help="whose code runs (default: this)")
    two.add_argument("folders", nargs=2, type=Path)
    args = parser.parse_args(argv)
    if args.command == "record":
        return record(args.folder.resolve(), args.checkout.resolve())
    faults = list(compare(*args.folders))
    print("\n".join(faults) or "equal bit for bit")
    return bool(faults)


def record(folder, checkout):
    """Runs the set into a new folder."""
    folder.mkdir(parents=True)
    (folder / "narrow.py").write_text(NARROW, encoding="utf-8")
    for root in ("images", "with-unlabeled"):
        make_images(folder / root, 160, (16, 16))
    (folder / "with-unlabeled" / "unlabeled").mkdir()
    for path in (folder / "with-unlabeled" / "train").glob("*/???.JPEG"):           # from 100 on
        path.rename(folder / "with-unlabeled" / "unlabeled" / path.name)

    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(checkout))
    script = checkout / "train_meta.py"
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    begins = {"disk": ["-c", WITHOUT_MEMORY], "two-processes": two, "sync-bn": two}
    for name, flags in RUNS.items():
        print(name, flush=True)
        command = [*begins.get(name, [script]), *shlex.split(f"{SHORT} {flags} --save-path {name}")]
        if name == "resumed":
            run([*command, "--total-steps", "5"], folder)
            run([*command, "--total-steps", "9", "--resume"], folder)
        if name == "stopped":                   # wherever that ends it, the resumed run must end the same
            run(command, folder, "step 5/", signal.SIGTERM, 128 + signal.SIGTERM)
        run([*command, *["--resume"] * (name in ("resumed", "stopped"))], folder)
    if "read from disk" not in (folder / "disk" / "log.txt").read_text(encoding="utf-8"):
        sys.exit("the log of disk does not say that its images were read from disk")
    for name in ("memory", "imagenet"):
        run([script, "--evaluate", f"{name}/checkpoint.pth", "--data-path", "images", "--predictions", f"{name}.csv"], folder)
    run([checkout / "plot_features.py", "--checkpoint-path", "neither/checkpoint.pth", "both/checkpoint.pth",
         "--save-path", "figure", "--num-point", "100"], folder)


def compare(before, after):
    """Yields the name of each thing that is not the same in two recorded folders."""
    files = ("checkpoint.pth", "model_best.pth", "results.json", "metrics.jsonl", INDICES)
    for name in ("memory.csv", "imagenet.csv", "figure/embedding.npz", *map("/".join, product(RUNS, files))):
        a, b = (contents(folder / name) for folder in (before, after))
        yield from (f"{name}: {part} differs" for part in a | b if a.get(part) != b.get(part))


def contents(path):
    """Returns name -> value of what is compared in a file."""
    if path.suffix == ".pth":
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {part: bitwise(saved[part]) for part in PARTS}
    if path.suffix == ".npz":
        return bitwise(dict(np.load(path)))
    if path.name == "results.json":
        results = json.loads(path.read_text(encoding="utf-8"))
        return {part: results[part] for part in ("error_rate", "labeled_error_rate", "steps")}
    return {"bytes": path.read_bytes()}


def bitwise(value):
    """Returns a value with types, shapes and bytes in place of the tensors that it holds: equal if these are, bit for bit."""
    if isinstance(value, dict):
        return {key: bitwise(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), *map(bitwise, value)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return str(value.dtype), value.shape, np.asarray(value).tobytes()
    return value


if __name__ == "__main__":
    sys.exit(main())
