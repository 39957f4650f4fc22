"""A loaded data set, what identifies it, and what its log says of it."""
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.streaming import ImageFiles
from datasets.table import UNLABELED, DataError


class Images(NamedTuple):
    """A loaded data set."""

    train_images: torch.Tensor | ImageFiles     # (N, 3, S, S) uint8
    train_labels: torch.Tensor                  # (N,) int64; UNLABELED for those without a class, which come last
    test_images: torch.Tensor | ImageFiles      # (M, 3, S, S) uint8
    test_labels: torch.Tensor                   # (M,) int64; UNLABELED of `load_without_classes`
    class_names: tuple
    name: str = ""                              # key of DATASETS
    mean: torch.Tensor | None = None            # (3,) of pixels in [0, 1]
    std: torch.Tensor | None = None             # (3,)
    flip: bool = False                          # whether training flips images at random
    warnings: tuple = ()                        # lines
    # Of data sets of folders only:
    where: str = ""                             # where the pixels are kept, and why
    train_files: tuple = ()                     # N paths
    test_files: tuple = ()                      # M paths
    ignored: str = ""                           # how many entries of the folders are not taken for images, and why
    left_out: dict = {}                         # name under root -> why it cannot be read, "" if that is not known
    root: Path | None = None                    # above all these

    @property
    def num_classes(self):
        return len(self.class_names)

    @property
    def num_train(self):
        """Number of the training images that have a class: the first ones."""
        return int((self.train_labels != UNLABELED).sum())

    @property
    def image_size(self):
        """S, pixels of a side."""
        return self.train_images.shape[-1]

    @property
    def padding(self):
        """Pixels of padding of the random crop: 4 at 32, as in the paper; 0 where a random resized crop takes its place."""
        return 0 if getattr(self.train_images, "resized_crop", False) else self.image_size // 8

    def indices_of(self, names):
        """Returns the indices of training images, ascending, a list; names: "class/file".  Raises DataError for others."""
        index = {"/".join(path.split(os.sep)[-2:]): i for i, path in enumerate(self.train_files[:self.num_train])}
        for name in names:
            if name not in index:
                why = ("--skip-corrupt left it out" if any(file.endswith(f"/{name}") for file in self.left_out)
                       else "it is a test image" if any(file.endswith(f"/{name}") for file in self.test_files)
                       else "write class/file")
                raise DataError(f"argument --split: there is no training image {name}: {why}")
        return sorted(index[name] for name in names)

    def describe(self):
        """Returns one line: name, numbers of images, in all and a class, their size, and the sum of the label array."""
        def count(labels):
            least, most = np.unique(np.bincount(labels, minlength=self.num_classes))[[0, -1]].tolist()
            return f"{len(labels):,} ({least:,}{f' to {most:,}' if most > least else ''} a class)"

        unlabeled = len(self.train_labels) - self.num_train
        return (f"{self.name}: {count(self.train_labels[:self.num_train])} training"
                + f", {unlabeled:,} without a class" * bool(unlabeled) + f" and {count(self.test_labels)} test images of "
                f"{self.image_size}x{self.image_size}, {self.num_classes} classes, SHA-256 of the labels "
                + sha256(self.train_labels))


def data_digest(images):
    """Returns what the data are, wherever they lie: name -> SHA-256, or text.

    Two of them are compared in the names that both hold: pixels are there of images in memory, names and sizes of files.
    """
    digest = {"class names": "/".join(images.class_names), "training labels": sha256(images.train_labels),
              "test labels": sha256(images.test_labels)}
    files, count = images.train_files, images.num_train
    for part, paths, pixels in (("training", files[:count], images.train_images), ("unlabeled", files[count:], None),
                                ("test", images.test_files, images.test_images)):
        if paths:
            names = "\0".join(path.removeprefix(f"{images.root}/") for path in paths)
            sizes = [os.path.getsize(path) if os.path.exists(path) else None for path in paths]
            digest |= {f"names of {part} files": hashlib.sha256(os.fsencode(names)).hexdigest(),
                       f"sizes of {part} files": hashlib.sha256(repr(sizes).encode()).hexdigest()}
        if isinstance(pixels, torch.Tensor):
            digest[f"{part} pixels"] = sha256(pixels)
    return digest


def duplicates(images):
    """Returns how many test images have exactly the pixels of a training image; 0 if the pixels are not in the CPU's memory."""
    if not all(isinstance(pixels, torch.Tensor) and pixels.is_cpu for pixels in (images.train_images, images.test_images)):
        return 0
    train = {hashlib.sha256(pixels).digest() for pixels in images.train_images.numpy()}
    return sum(hashlib.sha256(pixels).digest() in train for pixels in images.test_images.numpy())


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
