"""Folders of image files, root/<split>/<class>/* and root/unlabeled/**: what is in them, and where the pixels are kept."""
import hashlib
import os
from contextlib import closing
from itertools import chain

import numpy as np
import torch

from datasets.decoding import readable_formats
from datasets.streaming import ImageFiles
from datasets.table import HEAP, UNLABELED, DataError, check_root, has_unlabeled
from datasets.workers import Workers

TASK_SIZE = 500         # files that a worker decodes at a time where all of them are kept in memory


def load_folder(row, root, *, name, image_size, num_workers, memory, skip_corrupt, stop, **_):
    """root/<split>/<class>/* of both splits of a data set, images of any size and of the types in `decoding.FORMATS`.

    Those of root/unlabeled, at any depth, follow the training images.
    """
    check_root(name, root)
    splits, ignored, digest = [], {}, {}
    class_names, test_names = (list_classes(root / folder, ignored) for folder in row.folders)
    if odd := sorted(set(class_names) ^ set(test_names)):
        raise DataError(f"{root}: {' and '.join(row.folders)} must have the same classes, but only one has "
                        f"{', '.join(odd[:5])}: add what is missing"
                        + (f", or put images without a class in {root / HEAP}" if row.unlabeled else ""))
    if len(class_names) < 2:
        raise DataError(f"{root / row.folders[0]} has {len(class_names)} class folders: at least 2 are needed")
    for folder, split in zip(row.folders, ("training", "test")):
        files = [list_images(root / folder / class_name, ignored) for class_name in class_names]
        paths = list(chain.from_iterable(files))
        splits.append((paths, np.repeat(np.arange(len(files)), list(map(len, files)))))
        digest |= digest_files(split, root / folder, paths, skip_corrupt)
    (train, train_labels), (test, test_labels) = splits
    if has_unlabeled(name, root):
        unlabeled = list_unlabeled(root / HEAP, ignored, train + test)
        digest |= digest_files("unlabeled", root / HEAP, unlabeled, skip_corrupt)
        train = train + unlabeled
        train_labels = np.concatenate([train_labels, np.full(len(unlabeled), UNLABELED)])

    size = (len(train) + len(test)) * 3 * image_size ** 2
    source = f"{size / 1e9:,.2f} GB as pixels"
    reason = ("random resized crops need the files" if row.resized_crop else "--skip-corrupt" if skip_corrupt
              else f"they may take {memory / 1e9:,.2f} GB of memory" if memory is not None and size > memory else None)
    if reason:
        workers = Workers(num_workers, stop)
        train_images, test_images = (ImageFiles(paths, image_size, workers, row.resized_crop, skip_corrupt)
                                     for paths in (train, test))
        source = f"read from disk by {num_workers or 'no'} worker{'s' * (num_workers != 1)}: {source}, {reason}"
    else:
        pixels = decode_all(train + test, image_size, num_workers, stop)
        train_images, test_images = pixels[:len(train)], pixels[len(train):]
        source = f"in memory: {source}"
    return ((train_images, train_labels), (test_images, test_labels), class_names, source, tuple(train), tuple(test),
            describe_ignored(ignored, root), digest)


def decode_all(paths, image_size, num_workers, stop):
    """(N, 3, image_size, image_size) uint8, in the order of the paths.  Raises DataError for an unreadable file."""
    pixels = torch.empty((len(paths), 3, image_size, image_size), dtype=torch.uint8)
    count = min(num_workers, os.cpu_count() or 1, len(paths) // TASK_SIZE)
    with closing(Workers(count if count > 1 else 0, stop)) as workers:
        files = ImageFiles(paths, image_size, workers, task_size=TASK_SIZE)
        for index, batch in files.batches(TASK_SIZE * max(1, count)):
            pixels[index] = batch
    return pixels


def list_classes(folder, ignored):
    """Names of the class folders in a folder, in order; other entries are put into ignored, reason -> list of paths."""
    names = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            names.append(entry.name)
        else:
            ignored.setdefault("outside a class folder", []).append(entry)
    return names


def list_images(folder, ignored, nested=False):
    """Paths of the image files in a folder, in order; other entries are put into ignored, reason -> list of paths.

    nested: whether those in its folders count, too, at any depth; links to folders are not followed.
    Paths are strings: to make a Path of each would take as long as to read them.
    """
    paths, folders = [], [folder]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if nested and entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    folders.append(entry.path)
                else:
                    reason = why_ignored(entry)
                    (ignored.setdefault(reason, []) if reason else paths).append(entry.path)
    return sorted(paths)


def list_unlabeled(folder, ignored, others):
    """As `list_images`, at any depth.  Raises DataError if there is none, or if one is the file of an image in others."""
    paths = list_images(folder, ignored, nested=True)
    if not paths:
        raise DataError(f"{folder} holds no image: put images without a class in it, or remove it")
    files = {identity(path): path for path in others}
    for path in paths:
        if other := files.get(identity(path)):
            raise DataError(f"{folder}: {path} is the same file as {other}: remove one of them")
    return paths


def identity(path):
    """What all paths to one file share."""
    try:
        status = os.stat(path)
    except OSError:
        return path         # of a missing file, which is reported when it is read
    return status.st_dev, status.st_ino


def describe_ignored(ignored, root):
    """One line about what `list_images` and `list_classes` ignored under root."""
    return "; ".join(f"{len(paths):,} {reason} ({os.path.relpath(paths[0], root)!r}{', ...' * (len(paths) > 1)})"
                     for reason, paths in ignored.items())


def why_ignored(entry):
    """Why an entry of a class folder is not taken for an image, or None."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return "a link to a folder" if entry.is_symlink() else "a folder in a class folder"
    if not entry.name.lower().endswith(readable_formats()[1]):
        return "of another suffix"
    if not entry.is_file() and os.path.exists(entry.path):          # a link to nothing is a file that is missing
        return "not a regular file"                                 # to open a FIFO would wait for ever
    return None


def digest_files(split, folder, paths, skip_corrupt):
    """SHA-256 of the names of the files of a split, as under its folder, and of their sizes: what it is of -> hex digits.

    With skip_corrupt there are no sizes: a file may have been damaged, or replaced, since.
    """
    names = [path[len(str(folder)):] for path in paths]
    digest = {f"names of {split} files": hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()}
    if not skip_corrupt:
        sizes = [os.path.getsize(path) if os.path.exists(path) else None for path in paths]
        digest[f"sizes of {split} files"] = hashlib.sha256(repr(sizes).encode()).hexdigest()
    return digest
