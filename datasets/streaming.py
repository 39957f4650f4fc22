"""Images that stay on disk and are decoded when they are needed, for sets that do not fit into memory."""
from collections import deque

import numpy as np
import torch

from datasets.decoding import REMEDY
from datasets.sampling import resized_crop_choices
from datasets.table import DataError

TASK = 16           # files a task of a worker
AHEAD = 3           # steps, or batches of an evaluation, that are decoded ahead


class Files:
    """Stands where a uint8 tensor (N, 3, S, S) would: has its shape, is indexed by an array, and split for evaluation.

    Args:
        paths: N image files.
        image_size: S.
        workers: `decoding.Workers` that decode.
        crop: as in `decoding.decode_file`: None or "center".
        resized_crop: whether training takes a random resized crop; else it is the pad and crop of images in memory.
        skip: whether an unreadable file gives way to the next readable one; else it is a DataError that names it.
    """

    dtype = torch.uint8

    def __init__(self, paths, image_size, workers, crop=None, resized_crop=False, skip=False):
        self.paths = np.array(paths, dtype=object)
        self.image_size, self.workers, self.crop, self.resized_crop, self.skip = image_size, workers, crop, resized_crop, skip
        self.skipped = {}               # path -> what was wrong with it

    @property
    def shape(self):
        return torch.Size((len(self.paths), 3, self.image_size, self.image_size))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        part = Files(self.paths[index], self.image_size, self.workers, self.crop, self.resized_crop, self.skip)
        part.skipped = self.skipped
        return part

    def to(self, device):
        return self

    def submit(self, index, crops=None):
        """Sends the images of some indices to the workers: a list of futures for `collect`."""
        crops = [self.crop] * len(index) if crops is None else crops
        return [self.workers.submit(self.paths[index[i:i + TASK]].tolist(), self.image_size, crops[i:i + TASK])
                for i in range(0, len(index), TASK)]

    def collect(self, futures, pin=False):
        """Pixels (B, 3, S, S) uint8, in pinned memory on demand, and position -> what is wrong for unreadable files."""
        parts = self.workers.results(futures)
        pixels = torch.empty((sum(len(part) for part, _ in parts), *self.shape[1:]), dtype=torch.uint8, pin_memory=pin)
        start, faults = 0, {}
        for part, found in parts:
            pixels[start:start + len(part)] = torch.from_numpy(part)
            faults |= {start + i: fault for i, fault in found.items()}
            start += len(part)
        if faults and not self.skip:
            raise DataError(next(iter(faults.values())) + REMEDY)
        return pixels, faults

    def read(self, futures, index, members, crops=None, pin=False):
        """The indices and pixels (B, 3, S, S) that some futures lead to.

        With `skip` an unreadable file is replaced by the next in `members`, ascending indices, that can be read.
        """
        pixels, faults = self.collect(futures, pin)
        index = index.copy()
        for i, fault in faults.items():
            for _ in range(len(members)):
                self.skipped.setdefault(self.paths[index[i]], fault)
                index[i] = members[(np.searchsorted(members, index[i]) + 1) % len(members)]
                one, again = self.collect(self.submit(index[i:i + 1], None if crops is None else crops[i:i + 1]))
                if not again:
                    pixels[i] = one[0]
                    break
                fault = again[0]
            else:
                raise DataError(f"{fault}, nor can any other of {len(members)} images")
        return index, pixels

    def split(self, size):
        """Yields (indices, pixels) over the whole set in order; with `skip`, unreadable files are left out."""
        starts, sent = iter(range(0, len(self), size)), deque()
        try:
            while True:
                while len(sent) <= AHEAD and (start := next(starts, None)) is not None:
                    index = np.arange(start, min(start + size, len(self)))
                    sent.append((index, self.submit(index)))
                if not sent:
                    return
                index, futures = sent.popleft()
                pixels, faults = self.collect(futures)
                for i, fault in faults.items():
                    self.skipped.setdefault(self.paths[index[i]], fault)
                keep = np.delete(np.arange(len(index)), list(faults))
                if len(keep):
                    yield torch.from_numpy(index[keep]), pixels[keep] if faults else pixels
        finally:
            cancel(futures for _, futures in sent)


class Stream:
    """The decoded images of step 1, 2, ... of several index streams, each read ahead of its step.

    `stream(part, step)` gives indices (B,) and pixels (B, 3, S, S) uint8, the same whatever came before, and however many
    workers decode; the parts of a step are asked for in the order of `streams`.

    files: `Files`.  streams: part -> `sampling.IndexStream`.  seed: of the resized crops.  rows: the slice of every batch
    that is given.  pin: give pinned memory.
    """

    def __init__(self, files, streams, seed, rows=slice(None), pin=False):
        self.files, self.streams, self.seed, self.rows, self.pin = files, streams, seed, rows, pin
        self.sent = deque()             # (part, step), futures, indices, crops
        self.members = {part: np.sort(stream.indices) for part, stream in streams.items()}

    def __call__(self, part, step):
        if not self.sent or self.sent[0][0] != (part, step):
            self.close()
            parts = list(self.streams)
            self.coming = ((p, s) for s in range(step, step + 2 ** 62) for p in parts
                           if s > step or parts.index(p) >= parts.index(part))
        ahead = AHEAD * len(self.streams) if self.files.workers.count else 0
        while len(self.sent) <= ahead:
            self.send(*next(self.coming))
        _, futures, index, crops = self.sent.popleft()
        return self.files.read(futures, index, self.members[part], crops, self.pin)

    def send(self, part, step):
        index, crops = self.streams[part](step), None
        if self.files.resized_crop:
            crops = resized_crop_choices(len(index), self.seed, f"crop {part}", step)[self.rows]
        index = index[self.rows]
        self.sent.append(((part, step), self.files.submit(index, crops), index, crops))

    def close(self):
        """Takes back what was asked for ahead."""
        cancel(futures for _, futures, _, _ in self.sent)
        self.sent.clear()


def cancel(several):
    """Takes back futures that no worker has begun with, lists of them."""
    for futures in several:
        for future in futures:
            future.cancel()


def most_images(images):
    """How many of some images (N, 3, S, S) are looked at at once where it is only to measure: 1000, fewer with S above 128."""
    return min(1000, 1000 * 128 ** 2 // images.shape[-1] ** 2)
