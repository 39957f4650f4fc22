"""Images per second of the training input: whole batches from one uint8 tensor, beside torchvision's transforms per image.

    python3 benchmarks/input.py

Both crop, flip and normalize 50,000 random images of 32x32: `datasets.Batches` on the training device, torchvision in a
DataLoader with 4 worker processes that decode nothing.  The two take turns in one process, and the workers rest while
`Batches` is timed, so the ratio holds on a busy machine.
"""
import argparse
import statistics
import sys
import warnings
from itertools import count, islice
from pathlib import Path

from measuring import take_turns

sys.path.insert(0, str(Path(__file__).parent.parent))
IMAGES, LABELED, WORKERS, SAMPLES = 50_000, 4_000, 4, 20_000


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128, help="labeled images, and as many unlabeled (default: 128)")
    parser.add_argument("--device", default="cpu", help="where Batches works; torchvision delivers there (default: cpu)")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each (default: 7)")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "This DataLoader will create")

    import numpy as np
    import torch

    from datasets import Batches
    from datasets.loading import Images

    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (IMAGES, 3, 32, 32), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 10, IMAGES))
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.29)
    images = Images("random", pixels, labels, pixels[:1], labels[:1], tuple("0123456789"), mean, std, flip=True)
    batches = Batches(images, np.arange(LABELED), np.arange(LABELED, IMAGES), batch_size=args.batch_size, seed=0,
                      device=args.device, mixup_gamma=1.0)
    loader = per_image(pixels, labels, mean, std, args.batch_size, device=args.device)
    steps = count(1)

    def whole_batches():
        for step in islice(steps, 400):
            batches(step)

    def per_image_transforms():
        for x, _ in loader:
            x.to(args.device, non_blocking=True)

    times = take_turns({"ours": whole_batches, "theirs": per_image_transforms}, args.repeats, args.device)
    ours = [400 * 2 * args.batch_size / seconds for seconds in times["ours"]]
    theirs = [SAMPLES / seconds for seconds in times["theirs"]]
    ratios = [a / b for a, b in zip(ours, theirs)]
    print(f"{args.batch_size} + {args.batch_size} images of 32x32 a step, {args.device}, {torch.get_num_threads()} threads; "
          f"median of {args.repeats} turns; ratio {min(ratios):.1f} to {max(ratios):.1f}\n")
    print("| input | images per second | ratio |\n|---|---|---|")
    print(f"| torchvision per image, {WORKERS} workers | {statistics.median(theirs):,.0f} | 1.0 |")
    print(f"| datasets.Batches | {statistics.median(ours):,.0f} | {statistics.median(ratios):.1f} |")


def per_image(pixels, labels, mean, std, batch_size, device):
    """The usual road: PIL images, torchvision's transforms one by one, batches collated by worker processes."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset, RandomSampler
    from torchvision import transforms

    class PerImage(Dataset):
        arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        transform = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
                                        transforms.ToTensor(), transforms.Normalize(mean.tolist(), std.tolist())])

        def __len__(self):
            return len(self.arrays)

        def __getitem__(self, i):
            return self.transform(Image.fromarray(self.arrays[i])), labels[i]

    data = PerImage()
    return DataLoader(data, batch_size, sampler=RandomSampler(data, num_samples=SAMPLES), num_workers=WORKERS,
                      persistent_workers=True, pin_memory=device.startswith("cuda"))


if __name__ == "__main__":
    main()
