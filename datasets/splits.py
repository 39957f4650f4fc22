"""Which training images keep their labels, and which are held out."""
import numpy as np

from datasets.sampling import generator
from datasets.table import UNLABELED, DataError


def split_labels(train_labels, num_label, num_classes, seed, stream="split", flag="--num-label", keep=0):
    """Returns a class-balanced choice of labeled images, from a generator of its own, and the other images.

    Args:
        train_labels: (N,) class indices, an array or a tensor on the CPU.
        num_label: a multiple of num_classes, or N for all.
        num_classes, seed, stream: the same arguments always give the same split.
        flag: what an error calls num_label.
        keep: how many images of each class are among the others at least.

    Returns:
        labeled (num_label,) and unlabeled (N - num_label,) int64 indices, ascending, disjoint, together complete.

    Raises:
        DataError, a ValueError: if num_label cannot be split evenly, or a class has too few images.
    """
    labels = np.asarray(train_labels)
    counts = np.bincount(labels[labels != UNLABELED], minlength=num_classes)
    check_num_label(flag, num_label, num_classes, len(labels), counts.min(), keep)
    if num_label == len(labels):
        return np.arange(num_label), np.arange(0)
    rng = generator(seed, stream)
    members = [rng.permutation(np.flatnonzero(labels == k))[:num_label // num_classes] for k in range(num_classes)]
    labeled = np.sort(np.concatenate(members))
    return labeled, np.setdiff1d(np.arange(len(labels)), labeled)


def split_training(train_labels, num_label, num_val, num_classes, seed, named=None):
    """Returns labeled and validation indices, both class-balanced and disjoint; the validation part is drawn first.

    train_labels: (N,) class indices of the training images that have a class.
    num_label: None for all that are not validation images.
    named: None, or the indices of all images whose label may be used, which need not be balanced; those that are not drawn
        for validation are labeled, at least one of every class.
    Raises DataError for a list or for numbers that the labels do not allow.
    """
    labels = np.asarray(train_labels)
    rest = np.arange(len(labels)) if named is None else np.sort(named)
    if rest[-1] >= len(labels):
        raise DataError(f"argument --split: {rest[-1]} is not the index of one of {len(labels)} training images")
    if len(empty := np.setdiff1d(np.arange(num_classes), labels[rest])):
        raise DataError(f"argument --split: it names no image of class {empty[0]}: add one")
    validation = rest[:0]
    if num_val:
        validation, rest = (rest[part] for part in split_labels(labels[rest], num_val, num_classes, seed, "validation",
                                                                "--num-val", keep=1))
    if named is None and num_label is not None:
        rest = rest[split_labels(labels[rest], num_label, num_classes, seed)[0]]
    return rest, validation


def check_num_label(flag, num_label, num_classes, num_train, smallest_class=None, keep=0):
    """Raises DataError unless num_label images are equally many of each class, of which `keep` or more are left; or all.

    smallest_class: images of the class that has the fewest; None if it is not known.
    """
    most = num_classes * max(0, (num_train // num_classes if smallest_class is None else smallest_class) - keep)
    evenly, everything = num_label % num_classes == 0 and num_label <= most, num_label == num_train and not keep
    if num_label < 1 or not (evenly or everything):
        raise DataError(f"argument {flag}: {num_label} images cannot be drawn evenly from {num_classes} classes: "
                        f"use a multiple of {num_classes} up to {most}" + f", or {num_train} for all" * (not keep))
