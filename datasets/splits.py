"""Which training images keep their labels, and which are held out."""
import numpy as np

from datasets.sampling import generator
from datasets.table import UNLABELED, DataError


def split_labels(train_labels, num_label, num_classes, seed, stream="split"):
    """Returns a class-balanced choice of labeled images, from a generator of its own, and the other images.

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
    if num_label == len(labels) > 0:
        return np.arange(num_label), np.arange(0)
    counts = np.bincount(labels[labels != UNLABELED], minlength=num_classes)
    check_num_label(num_label, num_classes, len(labels), int(counts.min()))
    per_class, most = num_label // num_classes, num_classes * counts.min()
    if num_label > most:
        lacking = np.argmax(counts < per_class)
        raise DataError(f"{num_label} labels need {per_class} images of class {lacking}, which has {counts[lacking]}: "
                        f"use at most {most}")
    rng = generator(seed, stream)
    members = [rng.permutation(np.flatnonzero(labels == k))[:per_class] for k in range(num_classes)]
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
    labels, flag = np.asarray(train_labels), "--split"
    try:
        if named is not None and max(named) >= len(labels):
            raise DataError(f"{max(named)} is not the index of one of {len(labels)} training images")
        rest = np.arange(len(labels)) if named is None else np.sort(named)
        validation = rest[:0]
        if num_val:
            flag = "--num-val"
            validation, rest = (rest[part] for part in split_labels(labels[rest], num_val, num_classes, seed, "validation"))
        if named is None:
            flag = "--num-label"
            rest = rest[split_labels(labels[rest], len(rest) if num_label is None else num_label, num_classes, seed)[0]]
        elif len(empty := np.setdiff1d(np.arange(num_classes), labels[rest])):
            flag = "--split"
            raise DataError(f"it names no image of class {empty[0]}" + f" beside the {num_val} of --num-val" * bool(num_val)
                            + ": add one")
    except DataError as error:
        raise DataError(f"argument {flag}: {error}") from None
    return rest, validation


def hold_out(train_labels, num_test, class_names):
    """Returns class-balanced indices (num_test,) of images to test on, ascending, the same for every seed of a run.

    train_labels: (N,) class indices of the training images that have a class.  Every class keeps at least one of them.
    """
    counts = np.bincount(train_labels, minlength=len(class_names))
    most, smallest = len(class_names) * (counts.min() - 1), class_names[counts.argmin()]
    if num_test % len(class_names) or not 0 < num_test <= most:
        raise DataError(f"argument --num-test: {num_test} images cannot be held out evenly of {len(class_names)} classes, of "
                        f"which {smallest} has only {counts.min()}: use a multiple of {len(class_names)} up to {most}")
    return split_labels(train_labels, num_test, len(class_names), seed=0, stream="test")[0]


def check_num_label(num_label, num_classes, num_train, smallest_class=None):
    """Raises DataError if num_label labels, unless they are all, cannot be spread evenly over the classes.

    smallest_class: images of the class that has the fewest, for the advice; None if it is not known.
    """
    if 0 < num_label <= num_train and (num_label == num_train or num_label % num_classes == 0):
        return
    most = num_classes * (num_train // num_classes if smallest_class is None else smallest_class)
    lower = num_label - num_label % num_classes
    possible = ([str(count) for count in (lower, lower + num_classes) if 0 < count <= most]
                or [f"a multiple of {num_classes} up to {most}"] * (most > 0) + [f"{num_train} for all"] * (num_train > 0))
    raise DataError(f"{num_label} labels cannot be split evenly over {num_classes} classes of {num_train} images: "
                    f"use {' or '.join(possible) or 'fewer to validate on'}")
