"""Batches as a function of the step, from images that lie as one uint8 tensor on the training device, or on disk."""
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from datasets.augment import crop_and_flip, normalize
from datasets.sampling import IndexStream, crop_and_flip_choices, mixup_weights, resized_crop_choices
from datasets.streaming import PREFETCH, ImageFiles, ordered_batches
from datasets.table import DataError


class Batch(NamedTuple):
    x_l: torch.Tensor                   # (B, 3, S, S) float32, augmented and normalized
    y_l: torch.Tensor                   # (B,) int64
    x_u: torch.Tensor | None            # (B, 3, S, S)
    y_u: torch.Tensor | None            # (B,) labels of x_u, or UNLABELED: for telemetry, never for training
    lam: torch.Tensor | None            # (B,) mix-up weights


class Batches:
    """`batches(step)` is the batch of step 1, 2, ..., the same whatever came before, and wherever the images lie.

    A block `with batches:` ends the processes that decode.

    Args:
        images: as `load_dataset` returns them.
        labeled, unlabeled: index sets; without unlabeled, batches have no x_u.
        batch_size: labeled images a step, and as many unlabeled ones.
        mixup_gamma: lam ~ Beta(gamma, gamma), or None for none.
        rows: a slice of every batch, for one of several processes; what is in the whole batch does not depend on it.
    """

    def __init__(self, images, labeled, unlabeled=None, *, batch_size, seed, device="cpu", mixup_gamma=None,
                 rows=slice(None)):
        self.images, self.seed, self.device, self.mixup_gamma = images.to(device), seed, torch.device(device), mixup_gamma
        self.batch_size, self.rows = batch_size, rows
        self.train_labels, self.mean, self.std = (x.to(self.device) for x in (images.train_labels, images.mean, images.std))
        self.streams = {name: IndexStream(indices, batch_size, seed, name)
                        for name, indices in (("labeled", labeled), ("unlabeled", unlabeled)) if indices is not None}
        self.on_disk = isinstance(images.train_images, ImageFiles)
        self.ahead = {}                 # step -> batch, kept by `fault`
        self.cancel()

    def fault(self, step):
        """The error that keeps the batch of a step from being read from disk, or None; the batch is kept for its call.

        None as well if the `stop` of `load_dataset` has ended the waiting.
        """
        try:
            self.ahead = {step: self(step)} if self.on_disk else {}
        except InterruptedError:
            pass                        # whoever waits for the signal sees it
        except (DataError, OSError) as error:
            return error
        return None

    def __call__(self, step):
        if step in self.ahead:
            return self.ahead.pop(step)
        if self.on_disk and step != self.next_step:
            self.decoded = self.decode_from(step)
        self.next_step = None           # an error ends `decoded`
        x_l, y_l = self.draw("labeled", step)
        x_u, y_u = self.draw("unlabeled", step) if "unlabeled" in self.streams else (None, None)
        self.next_step = step + 1
        lam = None
        if self.mixup_gamma is not None:
            lam = self.to_device(mixup_weights(self.batch_size, self.mixup_gamma, self.seed, step)[self.rows])
        return Batch(x_l, y_l, x_u, y_u, lam)

    def draw(self, name, step):
        index, pixels = next(self.decoded) if self.on_disk else (self.streams[name](step)[self.rows], None)
        padding, flip = self.images.padding, self.images.flip
        choices = crop_and_flip_choices(self.batch_size, padding, flip, self.seed, f"augment {name}", step)
        choices = self.to_device(np.concatenate([index[:, None], choices[self.rows]], axis=1))
        index = choices[:, 0]
        pixels = self.to_device(pixels) if self.on_disk else self.images.train_images[index]
        x = crop_and_flip(pixels, choices[:, 1:], padding)
        return normalize(x, self.mean, self.std), self.train_labels[index]

    def decode_from(self, step):
        """Yields indices (B,) and pixels (B, 3, S, S) uint8 of images on disk, for each stream in turn, of step, step + 1, ...

        They are the same wherever it starts, and however many workers decode.
        """
        files = self.images.train_images
        for (index, crops, members), pixels, errors in files.decode_ahead(self.choices(step), PREFETCH * len(self.streams)):
            if errors:
                files.replace(pixels, errors, index, crops, members)
            yield index, pixels

    def choices(self, step):
        """Yields what `decode_from` takes: indices (B,), how each is cropped, and all indices of the stream."""
        for coming in count(step):
            for name, stream in self.streams.items():
                crops = (resized_crop_choices(self.batch_size, self.seed, f"crop {name}", coming)
                         if self.images.train_images.resized_crop else [None] * self.batch_size)
                yield stream(coming)[self.rows], crops[self.rows], stream.indices

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.on_disk:
            self.cancel()
            self.images.train_images.workers.close()

    def cancel(self):
        """Takes back what is decoded ahead; the processes that decode stay."""
        self.decoded = self.next_step = None

    def to_device(self, array):
        tensor = torch.from_numpy(array)
        # Pinned, the copy does not wait for the device to finish the step before.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def normalized_batches(images, labels, mean, std, device="cpu", batch_size=None):
    """Yields (x, y) over a whole set in order, normalized, without augmentation; see `streaming.ordered_batches`."""
    mean, std = mean.to(device), std.to(device)
    for index, pixels in ordered_batches(images, batch_size):
        yield normalize(pixels.to(device), mean, std), labels[index].to(device)
