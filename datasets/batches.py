"""Batches as a function of the step, from images that lie as one uint8 tensor on the training device, or on disk."""
from typing import NamedTuple

import numpy as np
import torch

from datasets.augment import crop_and_flip, normalize
from datasets.sampling import IndexStream, crop_and_flip_choices, mixup_weights
from datasets.streaming import Files, Stream, most_images
from datasets.table import DataError


class Batch(NamedTuple):
    x_l: torch.Tensor                   # (B, 3, H, W) float32, augmented and normalized
    y_l: torch.Tensor                   # (B,) int64
    x_u: torch.Tensor | None            # (B, 3, H, W)
    hidden: torch.Tensor | None         # (B,) labels of x_u: for telemetry, never for training
    lam: torch.Tensor | None            # (B,) mix-up weights


class Batches:
    """`batches(step)` is the batch of step 1, 2, ..., the same whatever came before, and wherever the images lie.

    A block `with batches:` leaves no decoding behind.

    Args:
        images: as `load_dataset` returns them.
        labeled, unlabeled: index sets; without unlabeled, batches have no x_u.
        batch_size: labeled images a step, and as many unlabeled ones.
        mixup_gamma: lam ~ Beta(gamma, gamma), or None for none.
        rows: a slice of every batch, for one of several processes; what is in the whole batch does not depend on it.
    """

    def __init__(self, images, labeled, unlabeled=None, *, batch_size, seed, device="cpu", mixup_gamma=None,
                 rows=slice(None)):
        self.images, self.seed, self.device, self.mixup_gamma = images, seed, torch.device(device), mixup_gamma
        self.batch_size, self.rows, self.padding = batch_size, rows, images.padding
        self.train_images = images.train_images.to(self.device)
        self.train_labels = images.train_labels.to(self.device)
        self.mean, self.std = images.mean.to(self.device), images.std.to(self.device)
        self.streams = {part: IndexStream(indices, batch_size, seed, part)
                        for part, indices in (("labeled", labeled), ("unlabeled", unlabeled)) if indices is not None}
        self.disk, self.ahead = None, None
        if isinstance(self.train_images, Files):
            self.disk = Stream(self.train_images, self.streams, seed, rows, pin=self.device.type == "cuda")

    def fault(self, step):
        """What keeps the batch of a step from being read from disk, an error; or None, and the batch is kept for its call.

        None as well if `Workers.stop` has ended the waiting.
        """
        try:
            self.ahead = self.disk and (step, self(step))
        except InterruptedError:
            pass                        # whoever waits for the signal sees it
        except (DataError, OSError) as error:
            return error
        return None

    def __call__(self, step):
        ahead, self.ahead = self.ahead, None
        if ahead and ahead[0] == step:
            return ahead[1]
        x_l, y_l = self.draw("labeled", step)
        x_u, hidden = self.draw("unlabeled", step) if "unlabeled" in self.streams else (None, None)
        lam = None
        if self.mixup_gamma is not None:
            lam = self.to_device(mixup_weights(self.batch_size, self.mixup_gamma, self.seed, step)[self.rows])
        return Batch(x_l, y_l, x_u, hidden, lam)

    def draw(self, part, step):
        index, pixels = self.disk(part, step) if self.disk else (self.streams[part](step)[self.rows], None)
        choices = crop_and_flip_choices(self.batch_size, self.padding, self.images.flip, self.seed, f"augment {part}", step)
        choices = self.to_device(np.concatenate([index[:, None], choices[self.rows]], axis=1))
        index = choices[:, 0]
        pixels = self.train_images[index] if pixels is None else pixels.to(self.device, non_blocking=True)
        x = crop_and_flip(pixels, choices[:, 1:], self.padding)
        return normalize(x, self.mean, self.std), self.train_labels[index]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.disk:
            self.disk.close()
            self.train_images.workers.close()

    def to_device(self, array):
        tensor = torch.from_numpy(array)
        # Pinned, the copy does not wait for the device to finish the step before.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def normalized_batches(images, labels, mean, std, device="cpu", batch_size=None):
    """Yields (x, y) over a whole set in order, normalized, without augmentation; images on disk that are skipped are left out.

    images: (N, 3, S, S) uint8, or `streaming.Files`.  batch_size: by default that of `most_images`.
    """
    mean, std = mean.to(device), std.to(device)
    batch_size = batch_size or most_images(images)
    if isinstance(images, Files):
        parts = images.split(batch_size)
    else:
        parts = zip(torch.arange(len(images)).split(batch_size), images.split(batch_size))
    for index, x in parts:
        yield normalize(x.to(device), mean, std), labels[index].to(device)
