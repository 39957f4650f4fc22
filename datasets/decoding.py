"""Image files to pixels.  Worker processes import this file, so it does not load torch."""
import os
import signal
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import exp, log, sqrt
from multiprocessing import get_context, parent_process
from threading import Thread

import numpy as np
from PIL import Image

from datasets.table import DataError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CHUNK = 500         # files a task: processes, not threads, since small images hold the interpreter lock
REMEDY = ": replace or remove it; --skip-corrupt trains without it"
DEAD = "a process that decodes images has ended, killed for its memory perhaps: lower --num-workers"


def list_images(folder):
    """Paths of the image files in a folder, as strings (a Path each would take as long as reading them), in order."""
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.lower().endswith(SUFFIXES)]


def decode_files(paths, image_size, num_workers=0):
    """(N, 3, image_size, image_size) uint8 RGB, in the order of the paths.  Raises DataError for an unreadable file."""
    chunks = [paths[i:i + CHUNK] for i in range(0, len(paths), CHUNK)]
    workers = min(num_workers, os.cpu_count() or 1, len(chunks))
    with Workers(workers if workers > 1 else 0) as pool:
        parts = results([pool.submit(chunk, image_size) for chunk in chunks])
    for _, faults in parts:
        for fault in faults.values():
            raise DataError(fault + REMEDY)
    return np.concatenate([np.empty((0, 3, image_size, image_size), np.uint8), *(pixels for pixels, _ in parts)])


class Workers:
    """Processes that decode, started at the first `submit`; with a count of 0 this process decodes, when asked for the result.

    Processes of concurrent.futures rather than a DataLoader's, because they need no torch: each is there in half a second
    and takes 32 MB, the same ones serve training and evaluation, and a fault comes back as what it is.
    """

    def __init__(self, count):
        self.count, self.pool = count, None

    def submit(self, paths, image_size, crops=None):
        """A future of `decode_chunk` with these arguments."""
        if self.count == 0:
            return Later(paths, image_size, crops)
        # Workers are born deaf to the signals that stop a run: one to the whole group must not break the pool.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
        try:
            if self.pool is None:
                self.pool = ProcessPoolExecutor(self.count, mp_context=get_context("spawn"), initializer=end_with_parent)
                signal.pthread_sigmask(signal.SIG_BLOCK, STOP)          # again: the first pool of a process lifts it
            return self.pool.submit(decode_chunk, paths, image_size, crops)
        except BrokenProcessPool as error:
            raise OSError(DEAD) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)


def results(futures):
    """Those of `Workers.submit`, in order."""
    try:
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise OSError(DEAD) from error


class Later:
    """A future that is computed when its result is asked for."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def result(self):
        return decode_chunk(*self.arguments)

    def cancel(self):
        pass


def end_with_parent():
    """Ends this worker process once its parent is gone, however that ended."""
    def wait():
        parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
    warnings.simplefilter("ignore")                     # of Pillow, about the metadata of images


def decode_chunk(paths, image_size, crops=None):
    """Pixels (N, 3, image_size, image_size) uint8, and position -> what is wrong for files that cannot be read.

    crops: one for each path, or None; see `decode_file`.
    """
    pixels, faults = np.zeros((len(paths), 3, image_size, image_size), np.uint8), {}
    for i, path in enumerate(paths):
        try:
            pixels[i] = decode_file(path, image_size, None if crops is None else crops[i])
        except DataError as error:
            faults[i] = str(error)
    return pixels, faults


def decode_file(path, image_size, crop=None):
    """(3, S, S) uint8 RGB, S = image_size.  Raises DataError for a file that cannot be read.

    crop: None, resized to the square; "center", the shorter side resized to S / 0.875 and the center cut out, as
    ImageNet is tested; or uniform numbers (10, 4) for `random_box`, a random part resized to the square.  The
    pixels of the latter two are those of torchvision's Resize, CenterCrop and RandomResizedCrop on images of Pillow.
    """
    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                image = image.convert("RGB")
            width, height = image.size
            if isinstance(crop, str):
                shorter = int(image_size / 0.875)
                if width <= height:
                    width, height = shorter, int(shorter * height / width)
                else:
                    width, height = int(shorter * width / height), shorter
                image = image.resize((width, height), Image.Resampling.BILINEAR)
                left, top = round((width - image_size) / 2), round((height - image_size) / 2)
                image = image.crop((left, top, left + image_size, top + image_size))
            elif crop is not None:
                top, left, rows, columns = random_box(height, width, crop)
                image = image.crop((left, top, left + columns, top + rows))
            if image.size != (image_size, image_size):
                image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error})") from None


def random_box(height, width, uniform):
    """Top, left, height and width of the box of torchvision's RandomResizedCrop: 8 to 100 % of the area, sides 3:4 to 4:3.

    uniform: (10, 4) numbers in [0, 1): area, ratio of the sides, top and left of ten tries, of which the first that fits
    inside the image is taken, or else the largest box in the center.
    """
    for area, ratio, top, left in uniform:
        area = height * width * (0.08 + 0.92 * area)
        ratio = exp(log(3 / 4) + (log(4 / 3) - log(3 / 4)) * ratio)
        columns, rows = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            return int(top * (height - rows + 1)), int(left * (width - columns + 1)), rows, columns
    rows, columns = height, width
    if width / height < 3 / 4:
        rows = round(width / (3 / 4))
    elif width / height > 4 / 3:
        columns = round(height * (4 / 3))
    return (height - rows) // 2, (width - columns) // 2, rows, columns
