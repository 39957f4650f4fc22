"""What several benchmarks share.  Importing it makes the checkout's own packages importable."""
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from models.convlarge import ConvLarge  # noqa: E402
from models.resnet import ResNet  # noqa: E402
from models.shakeshake import ShakeShake  # noqa: E402
from models.wideresnet import WideResNet  # noqa: E402

NARROW = {          # name -> what builds a network of this kind for ten classes, as small as it gets
    "convlarge": partial(ConvLarge, 10, width=16), "wideresnet": partial(WideResNet, 10, depth=10, widen=1),
    "shakeshake": partial(ShakeShake, 10, depth=8, width=16), "resnet18": partial(ResNet, 10, depth=18)}
warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)         # raised inside torch by its own jvp


def relative_error(found, exact):
    """Returns ||found - exact|| / ||exact||, a float, computed on the CPU in float64."""
    found, exact = found.double().cpu(), exact.double().cpu()
    return ((found - exact).norm() / exact.norm()).item()


def run(command, folder, stop_at=None, by=None, code=0):
    """Runs a command of Python in a folder and returns its output; raises RuntimeError unless it ends with an exit code.

    It gets the signal `by` when it prints a line that begins with stop_at.
    """
    process, lines = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=subprocess.PIPE, text=True), []
    for line in process.stdout:
        lines.append(line)
        if stop_at and line.startswith(stop_at):
            process.send_signal(by)
    if process.wait() != code:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with exit code {process.returncode}, not {code}")
    return "".join(lines)


def make_images(root, count, size):
    """Makes a tree of JPEG files for "folder" and "imagenet", pieces of the photographs of scikit-learn; returns its root.

    count: how many there are for training; one of each of the ten classes is for testing.  size: (width, height).
    """
    photos, rng = load_sample_images().images, np.random.default_rng(0)
    for i in range(count + 10):
        top, left = rng.integers(0, 428 - size[1]), rng.integers(0, 641 - size[0])
        piece = Image.fromarray(photos[rng.integers(2)][top:top + size[1], left:left + size[0]])
        for part in ("train",) if i < count else ("test", "val"):
            path = root / part / f"n{i % 10:08d}" / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            piece.save(path, quality=95)
    return root
