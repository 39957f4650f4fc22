"""Images that stay on disk and are decoded when they are needed, for sets that do not fit into memory."""
from collections import deque
from copy import copy
from itertools import islice

import numpy as np
import torch

from datasets.table import DataError

PREFETCH = 3        # training steps, or batches of an evaluation, that are decoded ahead


class ImageFiles:
    """The images of N files, decoded on demand by `workers`: indexed by a slice or an array it is the set of those.

    Args:
        paths: N image files.
        image_size: S; every image becomes (3, S, S) uint8.
        workers: `workers.Workers`.
        resized_crop: whether images are cropped as ImageNet's are, a random resized crop in training and the center in
            evaluation; else the whole image is resized.
        skip_corrupt: whether an unreadable file gives way to the next readable one in training and is left out in
            evaluation; else it is a DataError that names it.
        task_size: how many files a worker decodes at a time.
    """

    def __init__(self, paths, image_size, workers, resized_crop=False, skip_corrupt=False, task_size=16):
        self.paths, self.image_size, self.workers = np.array(paths, dtype=object), image_size, workers
        self.resized_crop, self.skip_corrupt, self.task_size = resized_crop, skip_corrupt, task_size
        self.skipped = {}               # path -> error message, shared by all subsets

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        subset = copy(self)
        subset.paths = self.paths[index]
        return subset

    def decode_ahead(self, items, depth):
        """Yields (item, pixels, errors) for each of some items (index, crops, ...), while the next `depth` are decoded.

        index: which images, (B,) integers.  crops: one for each, as in `decoding.decode_file`.
        pixels, errors: as in `collect`.
        """
        depth = depth if self.workers.count else 0
        submitted = ((item, self.submit(*item[:2])) for item in items)
        pending = deque()
        try:
            pending.extend(islice(submitted, depth + 1))
            while pending:
                item, futures = pending.popleft()
                yield item, *self.collect(futures)
                pending.extend(islice(submitted, 1))
        finally:
            for _, futures in pending:
                for future in futures:
                    future.cancel()

    def submit(self, index, crops):
        """Sends some images to the workers: a list of futures for `collect`."""
        tasks = (slice(i, i + self.task_size) for i in range(0, len(index), self.task_size))
        return [self.workers.submit(self.paths[index[task]].tolist(), self.image_size, crops[task]) for task in tasks]

    def collect(self, futures):
        """Pixels (B, 3, S, S) uint8, an array, and position -> error message for unreadable files."""
        results = [self.workers.result(future) for future in futures]
        pixels = np.concatenate([pixels for pixels, _ in results])
        errors = {i: error for i, error in enumerate(error for _, errors in results for error in errors) if error}
        if errors and not self.skip_corrupt:
            raise DataError(f"{next(iter(errors.values()))}: replace or remove it; --skip-corrupt trains without it")
        return pixels, errors

    def batches(self, batch_size):
        """Yields indices (B,) and pixels (B, 3, S, S) uint8 of the whole set in order, as evaluation crops them."""
        crop = "center" if self.resized_crop else None
        indices = (np.arange(i, min(i + batch_size, len(self))) for i in range(0, len(self), batch_size))
        items = ((index, [crop] * len(index)) for index in indices)
        for (index, _), pixels, errors in self.decode_ahead(items, PREFETCH):
            for i, error in errors.items():
                self.skipped.setdefault(self.paths[index[i]], error)
            index, pixels = (np.delete(array, list(errors), axis=0) for array in (index, pixels))
            if len(index):
                yield torch.from_numpy(index), torch.from_numpy(pixels)

    def replace(self, pixels, errors, index, crops, members):
        """Puts the next of `members`, indices (M,), that can be read in the place of each unreadable file of a batch.

        pixels, errors: of `collect`; index, crops: of `submit`.  Changes pixels and index.
        """
        members = np.sort(members)
        for i, error in errors.items():
            for _ in range(len(members)):
                self.skipped.setdefault(self.paths[index[i]], error)
                index[i] = members[(np.searchsorted(members, index[i]) + 1) % len(members)]
                one, unreadable = self.collect(self.submit(index[i:i + 1], crops[i:i + 1]))
                if not unreadable:
                    pixels[i] = one[0]
                    break
                error = unreadable[0]
            else:
                raise DataError(f"{error}, nor can any other of {len(members)} images")


def ordered_batches(images, batch_size=None):
    """Iterates over indices (B,) and pixels (B, 3, S, S) uint8 of a whole set in order, without augmentation.

    images: (N, 3, S, S) uint8, or ImageFiles.  batch_size: by default 1000, and fewer with S above 128.
    """
    image_size = images.image_size if isinstance(images, ImageFiles) else images.shape[-1]
    batch_size = batch_size or min(1000, 1000 * 128 ** 2 // image_size ** 2)
    if isinstance(images, ImageFiles):
        return images.batches(batch_size)
    return zip(torch.arange(len(images)).split(batch_size), images.split(batch_size))
