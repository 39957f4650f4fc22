"""Batches as a function of the step, from images in one uint8 tensor on the training device, or on disk."""
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from datasets.augment import crop_and_flip, normalize
from datasets.sampling import IndexStream, crop_and_flip_choices, mixup_weights, resized_crop_choices
from datasets.streaming import ImageFiles
from datasets.table import DataError


class Batch(NamedTuple):
    """What one step of training takes."""

    x_l: torch.Tensor                   # (B, 3, S, S) float32, augmented and normalized
    y_l: torch.Tensor                   # (B,) int64
    x_u: torch.Tensor | None            # (B, 3, S, S)
    y_u: torch.Tensor | None            # (B,) labels of x_u, or UNLABELED: for telemetry, never for training
    lam: torch.Tensor | None            # (B,) mix-up weights


class Batches:
    """The batch of step 1, 2, ... is `batches(step)`, the same whatever came before, and wherever the images lie.

    `read(step)` returns it with what keeps it from being read.  A block `with batches:` ends the processes that decode.

    Args:
        images: as `load_dataset` returns them.
        labeled, unlabeled: index sets; without unlabeled, batches have no x_u.
        batch_size: labeled images a step, and as many unlabeled ones.
        mixup_gamma: lam ~ Beta(gamma, gamma), or None for none.
        rows: a slice of every batch, for one of several processes; what is in the whole batch does not depend on it.
    """

    def __init__(self, images, labeled, unlabeled=None, *, batch_size, seed, device="cpu", mixup_gamma=None,
                 rows=slice(None)):
        self.padding, self.flip, self.seed, self.mixup_gamma = images.padding, images.flip, seed, mixup_gamma
        self.device, self.batch_size, self.rows = torch.device(device), batch_size, rows
        self.train_labels, self.mean, self.std = (x.to(self.device) for x in (images.train_labels, images.mean, images.std))
        self.streams = {name: IndexStream(indices, batch_size, seed, name)
                        for name, indices in (("labeled", labeled), ("unlabeled", unlabeled)) if indices is not None}
        self.on_disk = isinstance(images.train_images, ImageFiles)
        self.images = images.train_images if self.on_disk else images.train_images.to(self.device)
        self.pins = self.device.type != "cpu"
        self.decoded = self.next_step = None

    def read(self, step):
        """Returns the batch of a step and None, or None and the DataError or OSError that keeps it from being read."""
        try:
            return self(step), None
        except (DataError, OSError) as error:
            return None, error

    def __call__(self, step):
        if self.on_disk and step != self.next_step:
            self.decoded = self.images.decode(self.choices(step))
        self.next_step = None           # an error ends `decoded`
        x_l, y_l = self.draw("labeled", step)
        x_u, y_u = self.draw("unlabeled", step) if "unlabeled" in self.streams else (None, None)
        self.next_step = step + 1
        lam = None
        if self.mixup_gamma is not None:
            lam = self.to_device(mixup_weights(self.batch_size, self.mixup_gamma, self.seed, step)[self.rows])
        return Batch(x_l, y_l, x_u, y_u, lam)

    def draw(self, name, step):
        """Returns images (B, 3, S, S), augmented and normalized, and labels (B,) of one stream."""
        index, pixels = next(self.decoded) if self.on_disk else (self.streams[name](step)[self.rows], None)
        choices = crop_and_flip_choices(self.batch_size, self.padding, self.flip, self.seed, f"augment {name}", step)
        choices = self.to_device(np.concatenate([index[:, None], choices[self.rows]], axis=1))
        pixels = self.to_device(pixels) if self.on_disk else self.images[choices[:, 0]]
        x = crop_and_flip(pixels, choices[:, 1:], self.padding)
        return normalize(x, self.mean, self.std), self.train_labels[choices[:, 0]]

    def choices(self, step):
        """Yields indices (B,) and how each is cropped, as `ImageFiles.decode` takes them, for each stream in turn."""
        for coming in count(step):
            for name, stream in self.streams.items():
                crops = (resized_crop_choices(self.batch_size, self.seed, f"crop {name}", coming)
                         if self.images.resized_crop else [None] * self.batch_size)
                yield stream(coming)[self.rows], crops[self.rows]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.on_disk:
            self.decoded = self.next_step = None        # takes back what is decoded ahead
            self.images.workers.close()

    def to_device(self, array):
        tensor = torch.from_numpy(array)
        if self.pins:                   # pinned, the copy does not wait for the device to finish the step before
            try:
                return tensor.pin_memory().to(self.device, non_blocking=True)
            except RuntimeError:        # of a device that does not share pinned memory with the host
                self.pins = False
        return tensor.to(self.device)


def ordered_batches(images, batch_size=None, unreadable=None):
    """Yields indices (B,) and pixels (B, 3, S, S) uint8 of a whole set in order, without augmentation.

    images: (N, 3, S, S) uint8, or ImageFiles.  batch_size: by default 1000, and fewer with S above 128.
    unreadable: as `ImageFiles.decode` takes it.
    """
    batch_size = batch_size or max(1, min(1000, 1000 * 128 ** 2 // images.shape[-1] ** 2))
    if not isinstance(images, ImageFiles):
        return zip(torch.arange(len(images)).split(batch_size), images.split(batch_size))
    crop = "center" if images.resized_crop else None            # as evaluation crops it
    indices = (np.arange(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size))
    items = ((index, [crop] * len(index)) for index in indices)
    return (tuple(map(torch.from_numpy, pair)) for pair in images.decode(items, unreadable=unreadable))


def normalized_batches(images, labels, mean, std, device="cpu", batch_size=None):
    """Yields (x, y) over a whole set in order, normalized, without augmentation; see `ordered_batches`."""
    mean, std = mean.to(device), std.to(device)
    for index, pixels in ordered_batches(images, batch_size):
        yield normalize(pixels.to(device), mean, std), labels[index].to(device)
