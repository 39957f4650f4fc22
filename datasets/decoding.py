"""Image files to pixels.  Worker processes import this file, so it does not load torch."""
import os
import signal
import struct
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cache
from math import exp, log, sqrt
from multiprocessing import get_context, parent_process
from threading import Thread

import numpy as np
from PIL import Image, ImageOps

from datasets.table import DataError

# What is opened, whatever a file is called: pictures that Pillow decodes by itself (EPS would start Ghostscript).  TGA, which
# has no mark at its beginning, comes last.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "PCX", "QOI", "SGI", "DDS", "TGA")
BACKGROUND = "white"            # behind what is transparent
MOST_PIXELS = 2 ** 26           # of an image that is resized before its center is cut out: 256 MB
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
CHUNK = 500         # files a task: processes, not threads, since small images hold the interpreter lock
REMEDY = ": replace or remove it; --skip-corrupt trains without it"
DEAD = "a process that decodes images has ended"
WAIT = 0.2          # seconds between looks at whether to wait any longer


@cache
def known():
    """Of FORMATS the names that this Pillow reads, and the suffixes of their files."""
    Image.init()
    return (tuple(name for name in FORMATS if name in Image.OPEN),
            tuple(suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")))


def list_images(folder, ignored):
    """Paths of the image files in a folder, in order; those of its other entries are put into ignored, reason -> list.

    Paths are strings: a Path each would take as long as reading them.
    """
    paths = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            reason = why_ignored(entry)
            (ignored.setdefault(reason, []) if reason else paths).append(entry.path)
    return paths


def why_ignored(entry):
    """Why an entry of a folder is not taken for an image, or None."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return "a folder in a class folder"
    if not entry.name.lower().endswith(known()[1]):
        return "of another suffix"
    if not entry.is_file() and os.path.exists(entry.path):          # a link to nothing is a file that is missing
        return "not a regular file"                                 # to open a FIFO would wait for ever
    return None


def decode_files(paths, image_size, num_workers=0):
    """(N, 3, image_size, image_size) uint8 RGB, in the order of the paths.  Raises DataError for an unreadable file."""
    chunks = [paths[i:i + CHUNK] for i in range(0, len(paths), CHUNK)]
    workers = min(num_workers, os.cpu_count() or 1, len(chunks))
    with Workers(workers if workers > 1 else 0) as pool:
        parts = pool.results([pool.submit(chunk, image_size) for chunk in chunks])
    for _, faults in parts:
        for fault in faults.values():
            raise DataError(fault + REMEDY)
    return np.concatenate([np.empty((0, 3, image_size, image_size), np.uint8), *(pixels for pixels, _ in parts)])


class Workers:
    """Processes that decode, started at the first `submit`; with a count of 0 this process decodes, when asked for the result.

    Processes of concurrent.futures rather than a DataLoader's, because they need no torch: each is there in half a second
    and takes 32 MB, the same ones serve training and evaluation, and a fault comes back as what it is.
    """

    def __init__(self, count, stop=lambda: False):
        """stop: once this is true, waiting for a process that does not answer ends."""
        self.count, self.stop, self.pool = count, stop, None

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
            raise OSError(self.why_dead()) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    def results(self, futures):
        """Those of `submit`, in order.  Raises InterruptedError once `stop()` is true while they are waited for."""
        try:
            return [self.result(future) for future in futures]
        except BrokenProcessPool as error:
            raise OSError(self.why_dead()) from error

    def result(self, future):
        while True:
            try:
                return future.result(timeout=WAIT)
            except TimeoutError:
                if self.stop():
                    raise InterruptedError("stopped while images were decoded") from None

    def why_dead(self):
        """Once a process has ended: one that was killed has a negative exit code."""
        processes = list(self.pool._processes.values())
        for process in processes:
            process.kill()              # they may wait for a lock that the dead one has, and are deaf to the pool's signal
        for _ in range(500):            # the pool's thread may be the one that is told the exit code
            if all(process.exitcode is not None for process in processes):
                break
            time.sleep(0.01)
        if any((process.exitcode or 0) > 0 for process in processes):
            return f"{DEAD} before it began: in a program of your own start the work under if __name__ == \"__main__\":"
        return f"{DEAD}, killed for its memory perhaps: lower --num-workers"

    def close(self):
        """Ends the processes; the next `submit` starts new ones."""
        pool, self.pool = self.pool, None
        if pool:
            processes = list(pool._processes.values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGCONT)        # one that is stopped would never end

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class Later:
    """A future that is computed when its result is asked for."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def result(self, timeout=None):
        return decode_chunk(*self.arguments)

    def cancel(self):
        pass


def end_with_parent():
    """Ends this worker process once its parent is gone, however that ended."""
    def wait():
        parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def decode_chunk(paths, image_size, crops=None):
    """Pixels (N, 3, image_size, image_size) uint8, and position -> what is wrong for files that cannot be read.

    crops: one for each path, or None; see `decode_file`.
    """
    pixels, faults = np.zeros((len(paths), 3, image_size, image_size), np.uint8), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # of Pillow, about the metadata of images
        for i, path in enumerate(paths):
            try:
                pixels[i] = decode_file(path, image_size, None if crops is None else crops[i])
            except DataError as error:
                faults[i] = str(error)
    return pixels, faults


def decode_file(path, image_size, crop=None):
    """(3, S, S) uint8 RGB, S = image_size.  Raises DataError for a file that cannot be read.

    The first picture of the file, upright as its EXIF says, and where it is transparent over BACKGROUND.  Of more than 8 bits
    a channel: `eight_bits`.

    crop: None, resized to the square; "center", the shorter side resized to S / 0.875 and the center cut out, as
    ImageNet is tested; or uniform numbers (10, 4) for `random_box`, a random part resized to the square.  The
    pixels of the latter two are those of torchvision's Resize, CenterCrop and RandomResizedCrop on images of Pillow.
    """
    try:
        with Image.open(path, formats=known()[0]) as image:
            image = to_rgb(image)
            width, height = image.size
            if isinstance(crop, str):
                shorter = int(image_size / 0.875)
                if width <= height:
                    width, height = shorter, int(shorter * height / width)
                else:
                    width, height = int(shorter * width / height), shorter
                if width * height > MOST_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels are too long and thin to cut out the center")
                image = image.resize((width, height), Image.Resampling.BILINEAR)
                left, top = round((width - image_size) / 2), round((height - image_size) / 2)
                image = image.crop((left, top, left + image_size, top + image_size))
            elif crop is not None:
                top, left, rows, columns = random_box(height, width, crop)
                image = image.crop((left, top, left + columns, top + rows))
            if image.size != (image_size, image_size):
                image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:          # damaged files make Pillow's readers raise errors of any type
        raise DataError(f"{path} cannot be read as an image ({str(error) or type(error).__name__})") from None


def to_rgb(image):
    """An opened image upright, opaque, and of mode "RGB"."""
    image.load()
    # Damaged EXIF data, which Pillow reports by these types, turn nothing.
    with suppress(struct.error, KeyError, SyntaxError, TypeError, ValueError, ZeroDivisionError):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        image = eight_bits(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def eight_bits(image):
    """A gray image "L": whole numbers from 0 to 65,535, or floats from 0 to 1, become 0 to 255, the same in every image.

    Raises ValueError for other numbers, because no rule would suit every image.
    """
    values = np.asarray(image)
    low, high, top = values.min(), values.max(), 1 if image.mode == "F" else 65_535
    if not 0 <= low <= high <= top:                                     # as for a NaN
        raise ValueError(f"its numbers go from {low:g} to {high:g}: scale whole ones to 0 to 65,535, floats to 0 to 1")
    scaled = np.multiply(values, np.float32(255 / top), dtype=np.float32).round().astype(np.uint8)
    if "transparency" in image.info:                                    # the number of the transparent pixels
        scaled[values == image.info["transparency"]] = 255
    return Image.fromarray(scaled)


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
