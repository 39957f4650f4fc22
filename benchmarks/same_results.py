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
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from measuring import make_images

INDICES = "label_indices.txt"
SHORT = ("--num-label", "50", "-a", "convsmall", "--batch-size", "8", "--total-steps", "12", "--warmup", "3", "--milestones",
         "8,10", "--print-freq", "2", "--test-freq", "4", "--seed", "3", "--device", "cpu")
DIGITS, TREE = ("--dataset", "digits", "--mix-up"), ("--image-size", "16", "--mix-up", "--num-workers", "2", "--data-path")
RUNS = {
    "neither": (*DIGITS[:2], "--no-meta"),
    "meta": DIGITS[:2],
    "mix-up": (*DIGITS, "--no-meta"),
    "both": DIGITS,
    "finite-difference": (*DIGITS, "--meta-gradient", "finite-difference"),
    "unrolled": (*DIGITS, "--meta-gradient", "unrolled", "--consistency", "kl"),
    "bfloat16": (*DIGITS, "--precision", "bfloat16"),
    "validation": (*DIGITS, "--num-val", "50", "--include-labeled", "--schedule", "cosine", "--milestones", "[300000, 350000]"),
    "split": (*DIGITS, "--split", f"both/{INDICES}", "--seed", "4"),
    "init": (*DIGITS, "--init", "both/checkpoint.pth", "--meta-lr", "0.05"),
    "wideresnet": (*DIGITS, "-a", "narrow.py:Narrow"),
    "memory": ("--dataset", "folder", "--flip", *TREE, "images"),
    "unlabeled": ("--dataset", "folder", *TREE, "with-unlabeled"),
    "disk": ("--dataset", "folder", "--flip", *TREE, "images"),
    "imagenet": ("--dataset", "imagenet", *TREE, "images"),
    "two-processes": DIGITS,
    "sync-bn": (*DIGITS, "--sync-bn"),
    "resumed": DIGITS,
    "stopped": (*DIGITS, "--total-steps", "100", "--print-freq", "1", "--test-freq", "20"),
}
PARTS = ("step", "model", "optimizer", "rng", "labeled", "validation", "evaluations", "best", "mean", "std", "class_names")
WITHOUT_MEMORY = """import sys
import utils.device
utils.device.memory_for_images = lambda *args: 0
import train_meta
sys.exit(train_meta.main(sys.argv[1:]))"""
NARROW = """from models.wideresnet import WideResNet


class Narrow(WideResNet):
    def __init__(self, num_classes):
        super().__init__(num_classes, depth=10, widen=1)
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one, two = commands.add_parser("record"), commands.add_parser("compare")
    one.add_argument("folder", type=Path, help="a new one")
    one.add_argument("--checkout", type=Path, default=Path(__file__).parent.parent, help="whose code runs (default: this)")
    two.add_argument("folders", nargs=2, type=Path)
    args = parser.parse_args(argv)
    if args.command == "record":
        record(args.folder.resolve(), args.checkout.resolve())
        return 0
    faults = list(compare(*args.folders))
    print("\n".join(faults) or "equal bit for bit")
    return 1 if faults else 0


def record(folder, checkout):
    """Runs the set into a new folder."""
    folder.mkdir(parents=True)
    (folder / "narrow.py").write_text(NARROW, encoding="utf-8")
    for root in ("images", "with-unlabeled"):
        make_images(folder / root, 160, (16, 16))
    (folder / "with-unlabeled" / "unlabeled").mkdir()
    for path in (folder / "with-unlabeled" / "train").glob("*/???.JPEG"):           # from 100 on
        path.rename(folder / "with-unlabeled" / "unlabeled" / path.name)

    def run(*words, stop=False):
        process = subprocess.Popen([sys.executable, *words], cwd=folder, stdout=subprocess.PIPE, text=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)})
        for line in process.stdout:
            if stop and line.startswith("step 5/"):         # wherever that ends it, the resumed run must end the same
                process.send_signal(signal.SIGTERM)
        if process.wait() != (128 + signal.SIGTERM if stop else 0):
            sys.exit(f"it ended with exit code {process.returncode}")

    script = checkout / "train_meta.py"
    for name, flags in RUNS.items():
        print(name, flush=True)
        flags = [*SHORT, *flags, "--save-path", name]
        if name == "resumed":
            for steps in ("5", "9", "12"):
                run(script, *flags, "--total-steps", steps, "--resume")
        elif name == "stopped":
            run(script, *flags, stop=True)
            run(script, *flags, "--resume")
        elif name in ("two-processes", "sync-bn"):
            run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *flags)
        elif name == "disk":
            run("-c", WITHOUT_MEMORY, *flags)
            if "read from disk" not in (folder / name / "log.txt").read_text(encoding="utf-8"):
                sys.exit("its log does not say that its images were read from disk")
        else:
            run(script, *flags)
    for name in ("memory", "imagenet"):
        run(script, "--evaluate", f"{name}/checkpoint.pth", "--data-path", "images", "--predictions", f"{name}.csv")
    run(checkout / "plot_features.py", "--checkpoint-path", "neither/checkpoint.pth", "both/checkpoint.pth",
        "--save-path", "figure", "--num-point", "100")


def compare(before, after):
    """Yields the name of each thing that is not the same in two recorded folders."""
    def contents(path):
        if path.suffix == ".pth":
            saved = torch.load(path, map_location="cpu", weights_only=True)
            return {part: saved[part] for part in PARTS}
        if path.suffix == ".npz":
            return dict(np.load(path))
        if path.name == "results.json":
            results = json.loads(path.read_text(encoding="utf-8"))
            return {part: results[part] for part in ("error_rate", "labeled_error_rate", "steps")}
        return {"bytes": path.read_bytes()}

    files = ("checkpoint.pth", "model_best.pth", "results.json", "metrics.jsonl", INDICES)
    for name in ("memory.csv", "imagenet.csv", "figure/embedding.npz", *(f"{run}/{file}" for run in RUNS for file in files)):
        a, b = (contents(folder / name) for folder in (before, after))
        yield from (f"{name}: {part} differs" for part in {**a, **b} if not same(a.get(part), b.get(part)))


def same(a, b):
    """Returns whether two values, and all that they hold, are the same bit for bit."""
    if isinstance(a, (torch.Tensor, np.ndarray)):
        a, b = np.asarray(a), np.asarray(b)
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


if __name__ == "__main__":
    sys.exit(main())
