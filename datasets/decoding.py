"""Image files to pixels.  Worker processes import this file, so it does not load torch."""
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context, parent_process
from threading import Thread

import numpy as np
from PIL import Image

from datasets.table import DataError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CHUNK = 500         # files a task: processes, not threads, since small images hold the interpreter lock


def list_images(folder):
    """Paths of the image files in a folder, as strings (a Path each would take as long as reading them), in order."""
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.lower().endswith(SUFFIXES)]


def decode_files(paths, image_size, num_workers=0):
    """(N, 3, image_size, image_size) uint8 RGB, in the order of the paths.  Raises DataError for an unreadable file."""
    chunks = [paths[i:i + CHUNK] for i in range(0, len(paths), CHUNK)]
    decode = partial(decode_chunk, image_size=image_size)
    workers = min(num_workers, os.cpu_count() or 1, len(chunks))
    if workers < 2:
        parts = list(map(decode, chunks))
    else:
        # Workers are born deaf to the signals that stop a run: one to the whole group must not break the pool.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
        try:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
                signal.pthread_sigmask(signal.SIG_BLOCK, STOP)          # again: the first pool of a process lifts it
                parts = pool.map(decode, chunks)
                signal.pthread_sigmask(signal.SIG_SETMASK, heard)
                parts = list(parts)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)
    return np.concatenate([np.empty((0, 3, image_size, image_size), np.uint8), *parts])


def end_with_parent():
    """Ends this worker process once its parent is gone, however that ended."""
    def wait():
        parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def decode_chunk(paths, image_size):
    return np.stack([decode_file(path, image_size) for path in paths])


def decode_file(path, image_size):
    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                image = image.convert("RGB")
            if image.size != (image_size, image_size):
                image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}): replace or remove it") from None
