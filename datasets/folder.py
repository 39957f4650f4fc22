"""Data sets that are folders of image files: what of them is used, and where the pixels are kept."""
import os
from collections import defaultdict
from contextlib import closing
from math import prod

import numpy as np
import torch

from datasets.batches import ordered_batches
from datasets.decoding import readable_formats
from datasets.images import Images
from datasets.splits import split_labels
from datasets.streaming import REMEDY, ImageFiles, Workers
from datasets.table import DATASETS, UNLABELED, UNLABELED_FOLDER, DataError, has_unlabeled


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
        keep, errors = decode_all(files, search, None if reason else images)
        out |= errors
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
    paths = list_images(root, ignored, nested=True) if root.is_dir() else [str(root)] * root.is_file()
    if not paths:
        return None
    files = ImageFiles(paths, image_size, Workers(num_workers), row.resized_crop)
    left_out = {}
    if skip_corrupt:
        keep, left_out = decode_all(files, skip_corrupt)
        files = files[keep]
    if len(files) == 0:
        raise DataError(f"{root}: not one of {len(paths):,} images can be read: {left_out[paths[0]]}")
    return Images(files[:0], torch.empty(0, dtype=torch.int64), files, torch.full((len(files),), UNLABELED), tuple(class_names),
                  name, mean, std, row.flip, test_files=tuple(files.paths), ignored=describe_ignored(ignored, root),
                  left_out=left_out)


def decode_all(files, skip_corrupt, pixels=None):
    """Returns indices of the files that can be read, which fill their rows of pixels, (N, 3, S, S) uint8, and path -> error of
    the others, which without skip_corrupt are a DataError."""
    count = min(files.workers.count, os.cpu_count() or 1, len(files) // 500)        # a process takes time to start
    unreadable, part = {}, files[:]
    with closing(Workers(count if count > 1 else 0)) as part.workers:
        for index, batch in ordered_batches(part, unreadable=unreadable):
            if pixels is not None:
                pixels[index] = batch
    if unreadable and not skip_corrupt:
        error, others = next(iter(unreadable.values())), [files.paths[i] for i in unreadable][1:]
        more = f"; nor can {len(others):,} more, such as {', '.join(others[:4])}" if others else ""
        raise DataError(f"{error}{more}: {REMEDY}")
    return np.setdiff1d(np.arange(len(files)), list(unreadable)), {files.paths[i]: why for i, why in unreadable.items()}


def list_dataset(name, root, ignored, num_test=0):
    """Returns a tuple (path, class index or UNLABELED, whether it is a test image) for each image, and the class names.

    Training images come first, by class, then those without a class, then test images.  Other entries are put into ignored, a
    defaultdict, reason -> list of paths.  Paths are texts: to make a Path of each would take as long as to read them.
    Raises DataError if folders are missing or contradictory, or if one file is in two sets or classes.
    """
    train, test = (root / folder for folder in DATASETS[name].folders)
    class_names = list_classes(train, ignored)
    if len(class_names) < 2:
        raise DataError(f"{train} has {len(class_names)} class folders: at least 2 are needed")
    if DATASETS[name].unlabeled and UNLABELED_FOLDER in class_names:
        raise DataError(f"{train / UNLABELED_FOLDER} is no class: put images without a class in {root / UNLABELED_FOLDER}")
    test_names = [] if num_test else list_classes(test, ignored)
    if odd := [label for label in test_names if label not in class_names]:
        raise DataError(f"{test}: {train} has no class {', '.join(odd[:5])}: add training images of it, or remove its folder")
    files = [(path, k, False) for k, label in enumerate(class_names) for path in list_images(train / label, ignored)]
    if has_unlabeled(name, root):
        unlabeled = list_images(root / UNLABELED_FOLDER, ignored, nested=True)
        if not unlabeled:
            raise DataError(f"{root / UNLABELED_FOLDER} holds no image: put images without a class in it, or remove it")
        files += [(path, UNLABELED, False) for path in unlabeled]
    files += [(path, class_names.index(label), True) for label in test_names for path in list_images(test / label, ignored)]
    check_links(files, apart=num_test > 0)
    return files, class_names


def list_classes(folder, ignored):
    """Returns the names of the class folders in a folder, in order; other entries are put into ignored."""
    names = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            names.append(path.name)
        else:
            ignored["outside a class folder"].append(str(path))
    return names


def list_images(folder, ignored, nested=False):
    """Returns the paths of the image files in a folder, in order; other entries are put into ignored.

    nested: whether those in its folders count, too, at any depth; links to folders are not followed.
    """
    paths = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if nested and entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            paths += list_images(entry.path, ignored, nested)
        else:
            reason = why_ignored(entry)
            (ignored[reason] if reason else paths).append(entry.path)
    return sorted(paths)


def why_ignored(entry):
    """Returns why an entry of a class folder is not taken for an image, or None."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return "a link to a folder" if entry.is_symlink() else "a folder in a class folder"
    if not entry.name.lower().endswith(readable_formats()[1]):
        return "of another suffix"
    # To open a FIFO would wait for ever; a link to nothing is an image that is missing.
    return "not a regular file" if not entry.is_file() and os.path.exists(entry.path) else None


def describe_ignored(ignored, root):
    """Returns one line about what was ignored under root."""
    return "; ".join(f"{len(paths):,} {reason} ({os.path.relpath(paths[0], root)!r}{', ...' * (len(paths) > 1)})"
                     for reason, paths in ignored.items() if paths)


def check_links(files, apart):
    """Raises DataError if two paths in different sets or classes are one file; with apart, if any two with a class are."""
    seen = {}
    for path, *group in files:
        try:
            status = os.stat(path)
        except OSError:
            continue                    # a missing file is reported when it is read
        other, its_group = seen.setdefault((status.st_dev, status.st_ino), (path, group))
        if other != path and (group != its_group or apart and group[0] != UNLABELED):
            raise DataError(f"{path} is the same file as {other}: remove one of them")


def check_classes(files, class_names, folder, ignored):
    """Raises DataError unless each class has a training image; it says what else is in the class's folder under `folder`."""
    found = {k for _, k, is_test in files if not is_test}
    for place in (folder / name for k, name in enumerate(class_names) if k not in found):
        here = {reason: [path for path in paths if path.startswith(f"{place}/")] for reason, paths in ignored.items()}
        beside = describe_ignored(here, place)
        raise DataError(f"{place}: no image of class {place.name}{f' beside {beside}' * bool(beside)}: add one, or remove the "
                        "folder")
