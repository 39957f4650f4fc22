"""Data sets that are folders of image files: what of them is used, and where the pixels are kept."""
from collections import defaultdict
from contextlib import closing
from math import prod

import numpy as np
import torch

from datasets.batches import ordered_batches
from datasets.images import Images
from datasets.listing import check_classes, describe_ignored, list_dataset, list_images
from datasets.splits import split_labels
from datasets.streaming import ImageFiles, Workers
from datasets.table import DATASETS, UNLABELED, DataError


def load_folder(name, root, *, image_size, num_workers, memory, skip_corrupt, left_out, num_test, **_):
    """Returns the Images of root/<split>/<class>/* and root/unlabeled/**, files of any size and of the `decoding.FORMATS`."""
    row, ignored = DATASETS[name], defaultdict(list)
    listed, class_names = list_dataset(name, root, ignored, num_test)
    out = {str(root / file): "" for file in left_out or ()}             # path -> why it cannot be read
    listed = [file for file in listed if file[0] not in out]

    files = ImageFiles([path for path, *_ in listed], image_size, Workers(num_workers), row.resized_crop)
    size, search = prod(files.shape), skip_corrupt and left_out is None
    reason = ("random resized crops need the files" if row.resized_crop
              else f"they may take {memory / 1e9:,.2f} GB of memory" if memory is not None and size > memory else None)
    images = files if reason else torch.empty(files.shape, dtype=torch.uint8)
    if search or not reason:
        unreadable = decode_all(files, search, None if reason else images)
        keep = np.setdiff1d(np.arange(len(files)), list(unreadable))
        out |= {files.paths[i]: error for i, error in unreadable.items()}
        listed, files, images = [listed[i] for i in keep], files[keep], images[keep]
    check_classes(listed, class_names, root / row.folders[0], ignored | {"unreadable": list(out)})

    labels, is_test = (np.array([file[i] for file in listed], kind) for i, kind in ((1, np.int64), (2, bool)))
    if num_test:
        labeled = labels[labels != UNLABELED]           # the same images are held out whatever the seed of a run
        is_test[split_labels(labeled, num_test, len(class_names), 0, "test", "--num-test", keep=1)[0]] = True
    where = f"{size / 1e9:,.2f} GB as pixels, " + (f"read from disk with --num-workers {num_workers}: {reason}" if reason
                                                   else "in memory")
    return Images(images[~is_test], torch.from_numpy(labels[~is_test]), images[is_test], torch.from_numpy(labels[is_test]),
                  tuple(class_names), where=where, root=root, train_files=tuple(files.paths[~is_test]),
                  test_files=tuple(files.paths[is_test]), ignored=describe_ignored(ignored, root),
                  left_out={path.removeprefix(f"{root}/"): error for path, error in out.items()})


def load_without_classes(name, root, image_size, num_workers, skip_corrupt, class_names, mean, std):
    """Returns the image files in a folder, at any depth, or one such file, as test images without a class, or None.

    They are read from disk, and decoded as those of a data set are; class_names, mean and std are those of a run.
    """
    ignored, row = defaultdict(list), DATASETS[name]
    paths = list_images(root, ignored, nested=True) if root.is_dir() else [str(root)]
    if not paths:
        return None
    files = ImageFiles(paths, image_size, Workers(num_workers), row.resized_crop)
    unreadable = decode_all(files, skip_corrupt) if skip_corrupt else {}
    if len(unreadable) == len(files):
        raise DataError(f"{root}: not one of {len(files):,} images can be read: {unreadable[0]}")
    left_out = {files.paths[i]: error for i, error in unreadable.items()}
    files = files[np.setdiff1d(np.arange(len(files)), list(unreadable))]
    return Images(files[:0], torch.empty(0, dtype=torch.int64), files, torch.full((len(files),), UNLABELED), tuple(class_names),
                  name, mean, std, row.flip, test_files=tuple(files.paths), ignored=describe_ignored(ignored, root),
                  left_out=left_out)


def decode_all(files, skip_corrupt, pixels=None):
    """Returns index -> error of the files that cannot be read; the others fill their rows of pixels, (N, 3, S, S) uint8.

    Without skip_corrupt the first that cannot be read is a DataError.
    """
    unreadable = {}
    with closing(files.workers):
        for index, batch in ordered_batches(files, unreadable=unreadable if skip_corrupt else None):
            if pixels is not None:
                pixels[index] = batch
    return unreadable
