"""Images that stay on disk and are decoded when they are needed, by processes of concurrent.futures: in a DataLoader of torch
a signal to the whole process group loses the step or hangs the exit."""
import signal
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import copy
from itertools import islice
from multiprocessing import get_context

import numpy as np

from datasets.decoding import decode_files, exit_with_parent
from datasets.table import DataError

PREFETCH = 6        # batches that are decoded ahead
TASK_SIZE = 16      # files that a worker decodes at a time, at least
REMEDY = "replace it, or start anew with --skip-corrupt, which leaves it out"


class Workers:
    """A pool of `count` processes, started at the first `submit`; with a count of 0 this process decodes, in `submit`."""

    def __init__(self, count):
        self.count, self.pool = count, None

    def submit(self, *args):
        """Returns a future of `decode_files` with these arguments.  Both raise BrokenProcessPool if a process has died."""
        if self.count == 0:
            future = Future()
            future.set_result(decode_files(*args))
            return future
        # Workers start with all signals blocked: one to the whole process group must not break the pool.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            if self.pool is None:
                self.pool = ProcessPoolExecutor(self.count, mp_context=get_context("spawn"), initializer=exit_with_parent)
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())    # the first pool of a process unblocks some
            return self.pool.submit(decode_files, *args)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    def close(self, kill=False):
        """Ends the processes, after what they are decoding or at once; the next `submit` starts new ones."""
        if self.pool:
            for process in list(self.pool._processes.values()) if kill else ():
                process.kill()          # those of a broken pool may wait for a lock that the dead one holds
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None


class ImageFiles:
    """The images of N files, decoded on demand: indexed by a slice or an array it is the set of those.

    workers: `Workers`, which sets may share.  resized_crop: whether images are cropped as ImageNet's are, at random in training
    and the center in evaluation; else the whole image is resized.
    """

    def __init__(self, paths, image_size, workers, resized_crop=False):
        self.paths, self.image_size, self.workers = np.array(paths, dtype=object), image_size, workers
        self.resized_crop = resized_crop

    @property
    def shape(self):
        return len(self.paths), 3, self.image_size, self.image_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        subset = copy(self)
        subset.paths = self.paths[index]
        return subset

    def decode(self, items, unreadable=None):
        """Yields indices (B,) and pixels (B, 3, S, S) uint8 of items (index, crops), while the next ones are decoded.

        crops: one for each image, as in `decoding.decode_file`.  unreadable: a dict that takes index -> error of files that
        cannot be read, whose pixels are 0; without it, the first is a DataError.  Raises OSError if a process has died.
        """
        def futures_of(index, crops):
            size = max(TASK_SIZE, len(index) // (2 * self.workers.count or 1))
            return [self.workers.submit(self.paths[index[i:i + size]].tolist(), self.image_size, crops[i:i + size])
                    for i in range(0, len(index), size)]

        tasks, pending = ((index, futures_of(index, crops)) for index, crops in items), deque()
        try:
            pending.extend(islice(tasks, 1 + PREFETCH * bool(self.workers.count)))
            while pending:
                index, futures = pending.popleft()
                pixels, errors = zip(*(future.result() for future in futures))
                faults = {i: error for i, error in zip(index.tolist(), sum(errors, [])) if error}
                if unreadable is not None:
                    unreadable.update(faults)
                elif faults:
                    raise DataError(f"{next(iter(faults.values()))}: {REMEDY}")
                yield index, np.concatenate(pixels)
                pending.extend(islice(tasks, 1))
        except BrokenProcessPool as error:
            self.workers.close(kill=True)
            raise OSError("a process that decodes images has died, killed for its memory perhaps: lower --num-workers; in "
                          "a program of your own start the work under if __name__ == \"__main__\":") from error
        finally:
            for future in sum((futures for _, futures in pending), []):
                future.cancel()
