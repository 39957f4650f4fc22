"""The data sets: images, the labeled split, and batches that are a function of (seed, step).

Importing this package does not load torch; the names in LAZY bring it in on first use.
"""
from importlib import import_module

from datasets.splits import split_labels
from datasets.table import DATASETS, DataError, check_root, has_unlabeled

LAZY = {"load_dataset": "datasets.loading", "data_digest": "datasets.images", "duplicates": "datasets.images",
        "Batches": "datasets.batches", "normalized_batches": "datasets.batches", "load_without_classes": "datasets.folder"}
__all__ = ["DATASETS", "DataError", "check_root", "has_unlabeled", "split_labels", *LAZY]


def __getattr__(name):
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
