"""Batches as a function of the step, from images that lie as one uint8 tensor on the training device."""
from typing import NamedTuple

import numpy as np
import torch

from datasets.augment import crop_and_flip, normalize
from datasets.sampling import IndexStream, crop_and_flip_choices, mixup_weights


class Batch(NamedTuple):
    x_l: torch.Tensor                   # (B, 3, H, W) float32, augmented and normalized
    y_l: torch.Tensor                   # (B,) int64
    x_u: torch.Tensor | None            # (B, 3, H, W)
    hidden: torch.Tensor | None         # (B,) labels of x_u: for telemetry, never for training
    lam: torch.Tensor | None            # (B,) mix-up weights


class Batches:
    """`batches(step)` is the batch of step 1, 2, ..., the same whatever came before.

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
        self.batch_size, self.rows = batch_size, rows
        self.padding = images.train_images.shape[-1] // 8                # 4 pixels at 32, as in the paper
        self.train_images = images.train_images.to(self.device)
        self.train_labels = images.train_labels.to(self.device)
        self.mean, self.std = images.mean.to(self.device), images.std.to(self.device)
        self.labeled = IndexStream(labeled, batch_size, seed, "labeled")
        self.unlabeled = None if unlabeled is None else IndexStream(unlabeled, batch_size, seed, "unlabeled")

    def __call__(self, step):
        x_l, y_l = self.draw(self.labeled, "augment labeled", step)
        x_u, hidden = (None, None) if self.unlabeled is None else self.draw(self.unlabeled, "augment unlabeled", step)
        lam = None
        if self.mixup_gamma is not None:
            lam = self.to_device(mixup_weights(self.batch_size, self.mixup_gamma, self.seed, step)[self.rows])
        return Batch(x_l, y_l, x_u, hidden, lam)

    def draw(self, stream, augmentation, step):
        index = stream(step)
        choices = crop_and_flip_choices(len(index), self.padding, self.images.flip, self.seed, augmentation, step)
        choices = self.to_device(np.concatenate([index[:, None], choices], axis=1)[self.rows])
        index = choices[:, 0]
        x = crop_and_flip(self.train_images[index], choices[:, 1:], self.padding)
        return normalize(x, self.mean, self.std), self.train_labels[index]

    def to_device(self, array):
        tensor = torch.from_numpy(array)
        # Pinned, the copy does not wait for the device to finish the step before.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def normalized_batches(images, labels, mean, std, device="cpu", batch_size=1000):
    """Yields (x, y) over a whole set in order, normalized, without augmentation.  images: (N, 3, H, W) uint8."""
    mean, std = mean.to(device), std.to(device)
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        yield normalize(x.to(device), mean, std), y.to(device)
