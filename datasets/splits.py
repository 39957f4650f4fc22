"""Which training images keep their labels."""
from contextlib import contextmanager

import numpy as np

from datasets.sampling import generator
from datasets.table import DataError


def split_labels(train_labels, num_label, num_classes, seed, stream="split"):
    """A class-balanced choice of labeled images, from a generator of its own.

    Args:
        train_labels: (N,) class indices, an array or a tensor on the CPU.
        num_label: a multiple of num_classes, or N for all.
        num_classes, seed, stream: the same arguments always give the same split.

    Returns:
        labeled (num_label,) and unlabeled (N - num_label,) int64 indices, ascending, disjoint, together complete.

    Raises:
        DataError, a ValueError: if num_label cannot be split evenly, or a class has too few images.
    """
    labels = np.asarray(train_labels)
    if num_label == len(labels):
        return np.arange(num_label), np.arange(0)
    check_num_label(num_label, num_classes, len(labels))
    per_class = num_label // num_classes
    rng = generator(seed, stream)
    members = [rng.permutation(np.flatnonzero(labels == k)) for k in range(num_classes)]
    for k, images in enumerate(members):
        if len(images) < per_class:
            raise DataError(f"{num_label} labels need {per_class} images of class {k}, which has {len(images)}: "
                            f"use at most {num_classes * min(map(len, members))}")
    labeled = np.sort(np.concatenate([images[:per_class] for images in members]))
    return labeled, np.setdiff1d(np.arange(len(labels)), labeled)


def split_training(train_labels, num_label, num_val, num_classes, seed, given=None):
    """Labeled and validation indices, both class-balanced and disjoint; the validation part is drawn first.

    train_labels: (N,) class indices of the training images that have a class.
    num_label: None for all that are not validation images.
    given: None, or the indices of all images whose label may be used, which need not be balanced; those that are not drawn
        for validation are labeled, at least one of every class.
    Raises DataError for a list or for numbers that the labels do not allow.
    """
    labels = np.asarray(train_labels)
    if given is not None and max(given) >= len(labels):
        raise DataError(f"argument --split: {max(given)} is not the index of one of {len(labels)} training images")
    named = np.arange(len(labels)) if given is None else np.sort(given)
    validation, rest = np.arange(0), named
    if num_val:
        with errors_of("--num-val"):
            validation, rest = (named[part] for part in split_labels(labels[named], num_val, num_classes, seed, "validation"))
    if given is not None:
        empty = np.flatnonzero(np.bincount(labels[rest], minlength=num_classes) == 0)
        if len(empty):
            raise DataError(f"argument --split: it names no image of class {empty[0]}"
                            + f" beside the {num_val} of --num-val" * bool(num_val) + ": add one")
        return rest, validation
    with errors_of("--num-label"):
        labeled, _ = split_labels(labels[rest], num_label or len(rest), num_classes, seed)
    return rest[labeled], validation


@contextmanager
def errors_of(flag):
    """Inside, a DataError names the flag."""
    try:
        yield
    except DataError as error:
        raise DataError(f"argument {flag}: {error}") from None


def check_num_label(num_label, num_classes, num_train):
    """Raises DataError if num_label labels cannot be spread evenly over the classes; all images are always allowed."""
    if not 0 < num_label <= num_train:
        raise DataError(f"{num_label} labels of {num_train} training images: use 1 to {num_train}")
    if num_label != num_train and num_label % num_classes:
        lower = num_label - num_label % num_classes
        raise DataError(f"{num_label} labels cannot be split evenly over {num_classes} classes: "
                         f"use {f'{lower} or ' if lower else ''}{lower + num_classes}")


def check_split(labeled, validation, num_train, source):
    """Raises DataError, naming where they come from, unless two index sets are disjoint and of num_train images."""
    both = np.concatenate([labeled, validation])
    if len(np.unique(both)) < len(both) or both.min() < 0 or both.max() >= num_train:
        raise DataError(f"{source}: its labeled and validation images are not different ones of {num_train}")
