"""Does a change of structure change a result?  Runs a fixed set of small commands, and compares two such sets bit for bit.

    python3 benchmarks/same_results.py record before                # in the checkout as it was
    python3 benchmarks/same_results.py record after                 # in the changed one
    python3 benchmarks/same_results.py compare before after

Compared are every tensor of every checkpoint, metrics.jsonl, the list of labeled images, predictions and coordinates.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHORT = ("--num-label", "50", "-a", "convsmall", "--batch-size", "8", "--total-steps", "12", "--warmup", "3", "--milestones",
         "8,10", "--print-freq", "2", "--test-freq", "4", "--seed", "3", "--device", "cpu")
DIGITS, FOLDER = ("--dataset", "digits"), ("--dataset", "folder", "--data-path", "images", "--image-size", "16", "--flip")
NETWORK = ("-a", "narrow.py:Narrow")
RUNS = {
    "neither": (*DIGITS, "--no-meta"),
    "meta": DIGITS,
    "mix-up": (*DIGITS, "--no-meta", "--mix-up"),
    "both": (*DIGITS, "--mix-up"),
    "finite-difference": (*DIGITS, "--mix-up", "--meta-gradient", "finite-difference"),
    "unrolled": (*DIGITS, "--mix-up", "--meta-gradient", "unrolled", "--consistency", "kl"),
    "bfloat16": (*DIGITS, "--mix-up", "--precision", "bfloat16"),
    "validation": (*DIGITS, "--mix-up", "--num-val", "50", "--include-labeled", "--schedule", "cosine", "--milestones",
                   "[300000, 350000]"),
    "wideresnet": (*DIGITS, "--mix-up", *NETWORK),
    "memory": (*FOLDER, "--mix-up"),
    "disk": (*FOLDER, "--mix-up", "--skip-corrupt", "--num-workers", "2"),
}
NARROW = """from models.wideresnet import WideResNet


class Narrow(WideResNet):
    def __init__(self, num_classes):
        super().__init__(num_classes, depth=10, widen=1)
"""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("folder", type=Path)
    compare_parser = commands.add_parser("compare")
    for name in ("before", "after"):
        compare_parser.add_argument(name, type=Path)
    args = parser.parse_args(argv)
    if args.command == "record":
        record(args.folder.resolve())
        return 0
    faults = list(compare(args.before, args.after))
    print("\n".join(faults) or "equal bit for bit")
    return 1 if faults else 0


def record(folder):
    """Runs the set into a new folder."""
    folder.mkdir(parents=True)
    (folder / "narrow.py").write_text(NARROW, encoding="utf-8")
    make_images(folder / "images")
    for name, flags in RUNS.items():
        script(folder, "train_meta.py", *SHORT, *flags, "--save-path", name)
    for steps in ("5", "9", "12"):
        script(folder, "train_meta.py", *SHORT, *RUNS["both"], "--total-steps", steps, "--save-path", "resumed", "--resume")
    script(folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "train_meta.py", *SHORT,
           *RUNS["both"], "--save-path", "two-processes")
    script(folder, "train_meta.py", "--evaluate", "memory/checkpoint.pth", "--data-path", "images", "--predictions",
           "predictions.csv")
    script(folder, "plot_features.py", "--checkpoint-path", "neither/checkpoint.pth", "both/checkpoint.pth", "--save-path",
           "figure", "--num-point", "100")


def script(folder, name, *flags):
    name = name if name == "-m" else ROOT / name
    subprocess.run([sys.executable, name, *flags], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def make_images(root):
    """Digits as a folder of PNG files, 16 training and 4 test images a class."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for k in range(10):
        for i, pixels in enumerate(digits.images[digits.target == k][:20]):
            path = root / ("train" if i < 16 else "test") / f"class {k}" / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype("uint8")).convert("RGB").save(path)


def compare(before, after):
    """Yields a line for each thing that is not the same in two recorded folders."""
    import numpy as np
    import torch

    for name in (*RUNS, "resumed", "two-processes"):
        a, b = (torch.load(folder / name / "checkpoint.pth", weights_only=True) for folder in (before, after))
        for part in ("model", "optimizer", "labeled", "validation", "rng", "mean", "std"):
            a_tensors, b_tensors = tensors(a[part]), tensors(b[part])
            if a_tensors.keys() != b_tensors.keys():
                yield f"{name}: {part} has other entries"
            elif odd := [key for key in a_tensors if not torch.equal(a_tensors[key], b_tensors[key])]:
                yield f"{name}: {part}: {len(odd)} of {len(a_tensors)} tensors differ, {odd[0] or part} the first of them"
        a, b = ([json.loads(line) for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
                for folder in (before, after))
        if a != b:
            yield f"{name}: metrics.jsonl differs"
        if len({(folder / name / "label_indices.txt").read_bytes() for folder in (before, after)}) > 1:
            yield f"{name}: label_indices.txt differs"
    if len({(folder / "predictions.csv").read_bytes() for folder in (before, after)}) > 1:
        yield "predictions.csv differs"
    a, b = (np.load(folder / "figure" / "embedding.npz") for folder in (before, after))
    yield from (f"embedding.npz: {key} differs" for key in a if key not in b or not np.array_equal(a[key], b[key]))


def tensors(value, path=""):
    """path -> tensor, of everything in a part of a checkpoint."""
    import torch

    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, item in items for k, v in tensors(item, f"{path}/{key}").items()}


if __name__ == "__main__":
    sys.exit(main())
