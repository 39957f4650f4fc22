"""Images per second of the training input from disk, beside torchvision's ImageFolder in a DataLoader.

    python3 benchmarks/streaming.py

Both decode JPEG files, take a random resized crop of 224x224, flip and normalize.  Without --data-path the files are
pieces of the two photographs of scikit-learn in the sizes that ImageNet has, 500x375 on average.  The two take turns in
one process, each with workers of its own that rest while the other is timed, so the ratio holds on a busy machine.
"""
import argparse
import os
import statistics
import sys
import tempfile
import warnings
from itertools import count
from pathlib import Path

from measuring import take_turns

sys.path.insert(0, str(Path(__file__).parent.parent))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, help="a tree like ImageNet's (default: made for this)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--batch-size", type=int, default=64, help="labeled images, and as many unlabeled (default: 64)")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn (default: 10)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--device", default="cpu", help="where the images are normalized (default: cpu)")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "This DataLoader will create")
    with tempfile.TemporaryDirectory() as folder:
        compare(args, args.data_path or make_tree(Path(folder)))


def make_tree(root, images=40):
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos, rng = load_sample_images().images, np.random.default_rng(0)
    for k in range(10):
        for part, number in (("train", images), ("val", 1)):
            folder = root / part / f"n{k:08d}"
            folder.mkdir(parents=True)
            for i in range(number):
                height, width = rng.integers(200, 427), rng.integers(300, 640)
                top, left = rng.integers(0, 428 - height), rng.integers(0, 641 - width)
                piece = Image.fromarray(photos[rng.integers(2)][top:top + height, left:left + width])
                piece.resize((500, 375) if rng.random() < 0.75 else (375, 500)).save(folder / f"{i}.JPEG", quality=95)
    return root


def compare(args, root):
    import numpy as np
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from datasets import Batches, load_dataset

    images = load_dataset("imagenet", root, args.image_size, num_workers=args.num_workers)
    half = np.arange(len(images.train_labels)) % 2 == 0
    batches = Batches(images, *map(np.flatnonzero, (half, ~half)), batch_size=args.batch_size, seed=0, device=args.device)
    data = ImageFolder(root / "train", transforms.Compose([
        transforms.RandomResizedCrop(args.image_size), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(images.mean.tolist(), images.std.tolist())]))
    total = 2 * args.batch_size * args.steps
    loader = DataLoader(data, args.batch_size, sampler=RandomSampler(data, num_samples=total), num_workers=args.num_workers,
                        persistent_workers=args.num_workers > 0, pin_memory=args.device != "cpu")
    steps = count(1)

    def ours():
        for _ in range(args.steps):
            batches(next(steps))
        batches.cancel()                                    # takes back what was decoded ahead; the workers stay

    def theirs():
        for x, _ in loader:
            x.to(args.device, non_blocking=True)

    times = take_turns({"theirs": theirs, "ours": ours}, args.repeats, args.device)
    rates = {name: [total / seconds for seconds in values] for name, values in times.items()}
    workers = {"theirs": getattr(loader._iterator, "_workers", []), "ours": images.train_images.workers.processes()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["theirs"])]
    print(f"{args.batch_size} + {args.batch_size} images of {args.image_size}x{args.image_size} a step, {args.num_workers} "
          f"workers, {args.device}; median of {args.repeats} turns; ratio {min(ratios):.2f} to {max(ratios):.2f}\n")
    print("| input | images per second | ratio | memory of a worker, MiB |\n|---|---|---|---|")
    for name, work, ratio in (("torchvision's ImageFolder in a DataLoader", "theirs", 1.0),
                              ("datasets.Batches from disk", "ours", statistics.median(ratios))):
        print(f"| {name} | {statistics.median(rates[work]):,.0f} | {ratio:.2f} | {memory(workers[work])} |")
    images.train_images.workers.close()


def memory(processes):
    """Of a process, what it shares divided by those that share it: the mean of some."""
    lines = [line for process in processes
             for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()]
    sizes = [int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")]
    return f"{statistics.mean(sizes):.0f}" if sizes else "-"


if __name__ == "__main__":
    main()
