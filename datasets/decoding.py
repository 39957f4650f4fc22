"""Image files to pixels.  Worker processes import this file, so it does not load torch."""
import os
import struct
import warnings
from contextlib import suppress
from functools import cache
from math import exp, log, sqrt
from multiprocessing import parent_process
from threading import Thread

import numpy as np
from PIL import Image, ImageOps

from datasets.table import DataError

# What is opened, whatever a file is called: pictures that Pillow decodes by itself (EPS would start Ghostscript).  TGA, which
# has no mark at its beginning, comes last.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "PCX", "QOI", "SGI", "DDS", "TGA")
BACKGROUND = "white"            # behind what is transparent
MAX_PIXELS = 2 ** 26            # of an image that is resized before its center is cut out: 256 MB


@cache
def readable_formats():
    """Returns the names in FORMATS that this Pillow reads, and the suffixes of their files."""
    Image.init()
    return (tuple(name for name in FORMATS if name in Image.OPEN),
            tuple(suffix for suffix, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")))


def exit_with_parent():
    """Ends this worker process once its parent has ended, however that happened."""
    Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()


def decode_files(paths, image_size, crops):
    """Returns pixels (N, 3, image_size, image_size) uint8 RGB, and a list with an error message or None for each file.

    crops: one for each path, as in `decode_file`.
    """
    pixels, errors = np.zeros((len(paths), 3, image_size, image_size), np.uint8), [None] * len(paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # of Pillow, about the metadata of images
        for i, (path, crop) in enumerate(zip(paths, crops, strict=True)):
            try:
                pixels[i] = decode_file(path, image_size, crop)
            except DataError as error:
                errors[i] = str(error)
    return pixels, errors


def decode_file(path, image_size, crop=None):
    """Returns (3, S, S) uint8 RGB, S = image_size, of the first picture in a file.  Raises DataError if it cannot be read.

    crop: None, to resize the whole image to the square; "center", to resize the shorter side to S / 0.875 and cut out the
        center, as ImageNet is tested; or uniform numbers (10, 4) for `random_box`, to resize a random box to the square.  The
        pixels of the latter two are those of torchvision's Resize, CenterCrop and RandomResizedCrop on images of Pillow.
    """
    try:
        with Image.open(path, formats=readable_formats()[0]) as image:
            image = to_rgb(image)
            if isinstance(crop, str):
                image = center_crop(image, image_size)
            elif crop is not None:
                top, left, height, width = random_box(image.height, image.width, crop)
                image = image.crop((left, top, left + width, top + height))
            image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:          # damaged files make Pillow's readers raise errors of any type
        reason = getattr(error, "strerror", None) or str(error).replace(f" {str(path)!r}", "") or type(error).__name__
        raise DataError(f"{path} cannot be read as an image ({reason})") from None


def to_rgb(image):
    """Returns an opened image upright as its EXIF data say, over BACKGROUND where it is transparent, of 8 bits, mode "RGB"."""
    image.load()
    with suppress(struct.error, KeyError, SyntaxError, TypeError, ValueError, ZeroDivisionError):       # of damaged EXIF data
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        image = eight_bits(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def eight_bits(image):
    """Returns a gray image "L": whole numbers from 0 to 65,535, or floats from 0 to 1, become 0 to 255; others are refused."""
    values = np.asarray(image)
    low, high, top = values.min(), values.max(), 1 if image.mode == "F" else 65_535
    if not 0 <= low <= high <= top:                                     # as for a NaN
        raise ValueError(f"its numbers go from {low:g} to {high:g}: scale whole ones to 0 to 65,535, floats to 0 to 1")
    scaled = np.multiply(values, np.float32(255 / top), dtype=np.float32).round().astype(np.uint8)
    if "transparency" in image.info:                                    # the number of the transparent pixels
        scaled[values == image.info["transparency"]] = 255
    return Image.fromarray(scaled)


def center_crop(image, image_size):
    """Returns the square of image_size in the center, once the shorter side is resized to image_size / 0.875."""
    shorter = int(image_size / 0.875)
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too long and thin to cut out the center")
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + image_size, top + image_size))


def random_box(height, width, uniform):
    """Returns top, left, height and width of a box as in torchvision's RandomResizedCrop: 8 to 100 % of the area, 3:4 to 4:3.

    uniform: (10, 4) numbers in [0, 1): area, ratio of the sides, top and left of ten tries, of which the first that fits
    inside the image is taken, or else the largest box in the center.
    """
    for area, ratio, top, left in uniform:
        area = height * width * (0.08 + 0.92 * area)
        ratio = exp(log(3 / 4) + (log(4 / 3) - log(3 / 4)) * ratio)
        columns, rows = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            return int(top * (height - rows + 1)), int(left * (width - columns + 1)), rows, columns
    rows, columns = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    return (height - rows) // 2, (width - columns) // 2, rows, columns
