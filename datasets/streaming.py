"""Images that stay on disk and are decoded when they are needed, for sets that do not fit into memory."""
from collections import deque
from copy import copy
from itertools import count

import numpy as np
import torch

from datasets.sampling import resized_crop_choices
from datasets.table import DataError

TASK_SIZE = 16      # files that a worker decodes at a time
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
    """

    def __init__(self, paths, image_size, workers, resized_crop=False, skip_corrupt=False):
        self.paths, self.image_size, self.workers = np.array(paths, dtype=object), image_size, workers
        self.resized_crop, self.skip_corrupt = resized_crop, skip_corrupt
        self.skipped = {}               # path -> error message, shared by all subsets

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        subset = copy(self)
        subset.paths = self.paths[index]
        return subset

    def submit(self, index, crops=None, task_size=TASK_SIZE):
        """Sends the images of some indices (B,) to the workers: a list of futures for `collect`.

        crops: uniform numbers (B, 10, 4) for `decoding.random_box`, or None for the crop of an evaluation.
        """
        if crops is None:
            crops = ["center" if self.resized_crop else None] * len(index)
        tasks = (slice(i, i + task_size) for i in range(0, len(index), task_size))
        return [self.workers.submit(self.paths[index[task]].tolist(), self.image_size, crops[task]) for task in tasks]

    def collect(self, futures, pin_memory=False):
        """Pixels (B, 3, S, S) uint8, and position -> error message for unreadable files."""
        results, start, errors = [self.workers.result(future) for future in futures], 0, {}
        size = sum(len(pixels) for pixels, _ in results)
        batch = torch.empty((size, 3, self.image_size, self.image_size), dtype=torch.uint8, pin_memory=pin_memory)
        for pixels, found in results:
            batch[start:start + len(pixels)] = torch.from_numpy(pixels)
            errors |= {start + i: error for i, error in found.items()}
            start += len(pixels)
        if errors and not self.skip_corrupt:
            raise DataError(f"{next(iter(errors.values()))}: replace or remove it; --skip-corrupt trains without it")
        return batch, errors

    def submit_ahead(self, items, submit, depth):
        """Yields each of some items with the futures submit(item), once those of the next `depth` items are submitted too."""
        pending = deque()
        try:
            for item in items:
                pending.append((item, submit(item)))
                if len(pending) > depth or self.workers.count == 0:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            for _, futures in pending:
                for future in futures:
                    future.cancel()

    def batches(self, batch_size, task_size=TASK_SIZE):
        """Yields indices (B,) and pixels (B, 3, S, S) uint8 of the whole set in order, as evaluation crops them."""
        indices = (np.arange(i, min(i + batch_size, len(self))) for i in range(0, len(self), batch_size))
        for index, futures in self.submit_ahead(indices, lambda index: self.submit(index, task_size=task_size), PREFETCH):
            pixels, errors = self.collect(futures)
            for i, error in errors.items():
                self.skipped.setdefault(self.paths[index[i]], error)
            kept = np.delete(np.arange(len(index)), list(errors))
            if len(kept):
                yield torch.from_numpy(index[kept]), pixels[kept] if errors else pixels


    def replace(self, pixels, errors, index, crops, members):
        """Puts the next of `members`, indices (M,), that can be read in the place of each unreadable file of a batch.

        pixels, errors: of `collect`; index, crops: of `submit`.  Changes pixels and index.
        """
        members = np.sort(members)
        for i, error in errors.items():
            for _ in range(len(members)):
                self.skipped.setdefault(self.paths[index[i]], error)
                index[i] = members[(np.searchsorted(members, index[i]) + 1) % len(members)]
                one, unreadable = self.collect(self.submit(index[i:i + 1], None if crops is None else crops[i:i + 1]))
                if not unreadable:
                    pixels[i] = one[0]
                    break
                error = unreadable[0]
            else:
                raise DataError(f"{error}, nor can any other of {len(members)} images")


def training_images(files, streams, seed, step, rows=slice(None), pin_memory=False):
    """Yields indices (B,) and pixels (B, 3, S, S) uint8 for each of several index streams in turn, of step, step + 1, ...

    They are the same wherever it starts, and however many workers decode.

    files: `ImageFiles`.  streams: name -> `sampling.IndexStream`.  seed: of the crops.  rows: of every batch, a slice.
    """
    def choices():
        for coming in count(step):
            for name, stream in streams.items():
                index, crops = stream(coming), None
                if files.resized_crop:
                    crops = resized_crop_choices(len(index), seed, f"crop {name}", coming)[rows]
                yield index[rows], crops, stream.indices

    work = files.submit_ahead(choices(), lambda choice: files.submit(*choice[:2]), PREFETCH * len(streams))
    for (index, crops, members), futures in work:
        pixels, errors = files.collect(futures, pin_memory)
        if errors:
            files.replace(pixels, errors, index, crops, members)
        yield index, pixels


def ordered_batches(images, batch_size=None):
    """Iterates over indices (B,) and pixels (B, 3, S, S) uint8 of a whole set in order, without augmentation.

    images: (N, 3, S, S) uint8, or ImageFiles.  batch_size: by default 1000, and fewer with S above 128.
    """
    image_size = images.image_size if isinstance(images, ImageFiles) else images.shape[-1]
    batch_size = batch_size or min(1000, 1000 * 128 ** 2 // image_size ** 2)
    if isinstance(images, ImageFiles):
        return images.batches(batch_size)
    return zip(torch.arange(len(images)).split(batch_size), images.split(batch_size))
