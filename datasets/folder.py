"""Data sets that are folders of image files: what of them is used, and where the pixels are kept."""
import os
from contextlib import closing
from math import prod

import numpy as np
import torch

from datasets.images import Images
from datasets.listing import check_classes, describe_ignored, list_dataset, list_images, names_under
from datasets.splits import split_labels
from datasets.streaming import REMEDY, ImageFiles, Workers
from datasets.table import DATASETS, UNLABELED, DataError

TASK_SIZE = 500         # files that a worker decodes at a time where a whole set is decoded; fewer of a size above 128


def load_folder(name, root, *, image_size, num_workers, memory, skip_corrupt, left_out, num_test, **_):
    """Returns the Images of root/<split>/<class>/* and root/unlabeled/**, files of any size and of the `decoding.FORMATS`."""
    row, ignored = DATASETS[name], {}
    listed, class_names = list_dataset(name, root, ignored, num_test)
    out = {str(root / file): "" for file in left_out or ()}             # path -> why it cannot be read
    listed = [file for file in listed if file[0] not in out]
    check_classes(listed, class_names, root / row.folders[0], ignored, out)

    files = ImageFiles([path for path, *_ in listed], image_size, Workers(num_workers), row.resized_crop)
    size, keep = prod(files.shape), np.arange(len(files))
    reason = ("random resized crops need the files" if row.resized_crop
              else f"they may take {memory / 1e9:,.2f} GB of memory" if memory is not None and size > memory else None)
    pixels = None if reason else torch.empty(files.shape, dtype=torch.uint8)
    if not reason or skip_corrupt and left_out is None:
        unreadable = decode_all(files, num_workers, pixels)
        if unreadable and (left_out is not None or not skip_corrupt):
            first, *others = unreadable
            more = f"; nor can {len(others):,} more, such as {', '.join(files.paths[i] for i in others[:4])}" if others else ""
            raise DataError(f"{unreadable[first]}{more}: {REMEDY}")
        out |= {files.paths[i]: error for i, error in unreadable.items()}
        keep = np.setdiff1d(keep, list(unreadable))
        listed = [listed[i] for i in keep]
        check_classes(listed, class_names, root / row.folders[0], ignored, out)
    labels, is_test = (np.array([file[i] for file in listed], kind) for i, kind in ((1, np.int64), (2, bool)))
    if num_test:
        labeled = labels[labels != UNLABELED]           # the same images are held out whatever the seed of a run
        is_test[split_labels(labeled, num_test, len(class_names), 0, "test", "--num-test", keep=1)[0]] = True

    train, test = keep[~is_test], keep[is_test]
    images = files if reason else pixels
    where = f"{size / 1e9:,.2f} GB as pixels, " + (f"read from disk with --num-workers {num_workers}: {reason}" if reason
                                                   else "in memory")
    return Images(images[train], torch.from_numpy(labels[~is_test]), images[test], torch.from_numpy(labels[is_test]),
                  tuple(class_names), where=where, root=root, train_files=tuple(files.paths[train]),
                  test_files=tuple(files.paths[test]), ignored=describe_ignored(ignored, root),
                  left_out=dict(zip(names_under(root, out), out.values())))


def load_without_classes(name, root, image_size, num_workers, skip_corrupt, class_names, mean, std):
    """Returns the image files in a folder, at any depth, or one such file, as test images without a class, or None.

    They are read from disk, and decoded as those of a data set are; class_names, mean and std are those of a run.
    """
    ignored, row = {}, DATASETS[name]
    paths = list_images(root, ignored, nested=True) if root.is_dir() else [str(root)]
    if not paths:
        return None
    files = ImageFiles(paths, image_size, Workers(num_workers), row.resized_crop)
    unreadable = decode_all(files, num_workers) if skip_corrupt else {}
    if len(unreadable) == len(files):
        raise DataError(f"{root}: not one of {len(files):,} images can be read: {unreadable[0]}")
    left_out = {files.paths[i]: error for i, error in unreadable.items()}
    files = files[np.setdiff1d(np.arange(len(files)), list(unreadable))]
    return Images(files[:0], torch.empty(0, dtype=torch.int64), files, torch.full((len(files),), UNLABELED), tuple(class_names),
                  name, mean, std, row.flip, test_files=tuple(files.paths), ignored=describe_ignored(ignored, root),
                  left_out=left_out)


def decode_all(files, num_workers, pixels=None):
    """Returns index -> error of the files that cannot be read; the others fill their rows of pixels, (N, 3, S, S) uint8."""
    task_size, unreadable = max(1, min(TASK_SIZE, TASK_SIZE * 128 ** 2 // files.image_size ** 2)), {}
    count = min(num_workers, os.cpu_count() or 1, len(files) // task_size)
    with closing(Workers(count if count > 1 else 0)) as workers:
        files = ImageFiles(files.paths, files.image_size, workers, files.resized_crop, task_size)
        for index, batch in files.decode_in_order(task_size, depth=2 * count, unreadable=unreadable):
            if pixels is not None:
                pixels[index] = torch.from_numpy(batch)
    return unreadable
