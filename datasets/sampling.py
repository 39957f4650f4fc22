"""Every random choice about the data, as a function of (seed, step): a run can start at any step with nothing to replay.

The choices are drawn on the host, a few kilobytes a step, so that they are the same on every device.
"""
from functools import lru_cache

import numpy as np

STREAMS = ("split", "validation", "labeled", "unlabeled", "augment labeled", "augment unlabeled", "mix-up",
           "crop labeled", "crop unlabeled", "test")


def generator(seed, stream, counter=0):
    """Returns the random generator of one stream at one step or pass, independent of every other."""
    return np.random.default_rng([seed, STREAMS.index(stream), counter])


class IndexStream:
    """Endless passes over an index set, each a fresh permutation; batches run across the boundary of passes.

    `stream(step)` returns the batch of step 1, 2, ...  Memory is that of one permutation, whatever the number of steps.
    """

    def __init__(self, indices, batch_size, seed, stream):
        indices, self.batch_size, self.length = np.asarray(indices), batch_size, len(indices)
        self.permutation = lru_cache(maxsize=1)(lambda number: generator(seed, stream, number).permutation(indices))

    def __call__(self, step):
        passes, places = np.divmod(np.arange((step - 1) * self.batch_size, step * self.batch_size), self.length)
        return np.concatenate([self.permutation(number)[places[passes == number]] for number in np.unique(passes)])


def crop_and_flip_choices(count, padding, flip, seed, stream, step):
    """Returns (count, 3) int64: row offset and column offset in [0, 2 * padding], and whether to flip."""
    rng = generator(seed, stream, step)
    offsets = rng.integers(0, 2 * padding + 1, size=(count, 2))
    flips = rng.integers(0, 2, size=(count, 1)) * flip
    return np.concatenate([offsets, flips], axis=1)


def resized_crop_choices(count, seed, stream, step):
    """Returns (count, 10, 4) float64, uniform on [0, 1), for `decoding.random_box`."""
    return generator(seed, stream, step).random((count, 10, 4))


def mixup_weights(count, gamma, seed, step):
    """Returns (count,) float32, lam ~ Beta(gamma, gamma), one per sample (line 9 of Algorithm 2)."""
    return generator(seed, "mix-up", step).beta(gamma, gamma, size=count).astype(np.float32)
