"""What several benchmarks share."""
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def relative_error(found, exact):
    """Returns ||found - exact|| / ||exact||, a float, computed on the CPU in float64."""
    found, exact = found.double().cpu(), exact.double().cpu()
    return ((found - exact).norm() / exact.norm()).item()


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
