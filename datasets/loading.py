"""A data set by its name: from files, or scikit-learn's own digits, to uint8 images and their labels."""
import hashlib
import os
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.folder import describe_ignored, list_images, load_folder
from datasets.streaming import ImageFiles, ordered_batches
from datasets.table import DATASETS, UNLABELED, DataError
from datasets.workers import Workers


class Images(NamedTuple):
    name: str
    train_images: torch.Tensor | ImageFiles     # (N, 3, S, S) uint8
    train_labels: torch.Tensor                  # (N,) int64; UNLABELED for those without a class, which come last
    test_images: torch.Tensor | ImageFiles      # (M, 3, S, S) uint8
    test_labels: torch.Tensor                   # (M,) int64; UNLABELED of `load_without_classes`
    class_names: tuple
    mean: torch.Tensor                          # (3,) of pixels in [0, 1]
    std: torch.Tensor                           # (3,)
    flip: bool                                  # whether training flips images at random
    # Of "folder" and "imagenet" only:
    source: str = ""                            # where the pixels are kept, and why
    train_files: tuple = ()                     # N paths
    test_files: tuple = ()                      # M paths
    ignored: str = ""                           # how many entries of the folders are not taken for images, and why
    files_digest: dict = {}                     # of `folder.digest_files`, training and test

    @property
    def num_classes(self):
        return len(self.class_names)

    @property
    def num_train(self):
        """Number of the training images that have a class: the first ones."""
        return int((self.train_labels != UNLABELED).sum())

    @property
    def image_size(self):
        """S, pixels of a side."""
        return self.train_images.image_size if isinstance(self.train_images, ImageFiles) else self.train_images.shape[-1]

    def indices_of(self, names):
        """Those of training images, ascending, a list; names: "class/file".  Raises DataError if there is no such image."""
        index = {"/".join(path.split(os.sep)[-2:]): i for i, path in enumerate(self.train_files[:self.num_train])}
        if odd := next((name for name in names if name not in index), None):
            raise DataError(f"argument --split: there is no training image {odd}: write class/file")
        return sorted(index[name] for name in names)

    @property
    def labels_sha256(self):
        """SHA-256 of the training labels as little-endian int64: identifies the data set whose images a split lists."""
        return sha256(self.train_labels.numpy().astype("<i8"))

    @property
    def digest(self):
        """What the data are, wherever they lie: name -> SHA-256, or text.  Two of them are compared in the names that both
        hold: pixels are there of images in memory, names and sizes of files."""
        digest = {"class names": "/".join(self.class_names), "training labels": self.labels_sha256,
                  "test labels": sha256(self.test_labels.numpy().astype("<i8")), **self.files_digest}
        for split, images in (("training", self.train_images), ("test", self.test_images)):
            if not isinstance(images, ImageFiles):
                digest[f"{split} pixels"] = sha256(images)
        return digest

    @property
    def padding(self):
        """Of the random crop, in pixels: 4 at 32, as in the paper; 0 where a random resized crop takes its place."""
        return 0 if getattr(self.train_images, "resized_crop", False) else self.image_size // 8

    def to(self, device):
        """The same with the pixels that are in memory moved to a device; labels, mean and std stay on the CPU."""
        train, test = (images if isinstance(images, ImageFiles) else images.to(device)
                       for images in (self.train_images, self.test_images))
        return self._replace(train_images=train, test_images=test)

    def skipped(self):
        """Lines about images that were skipped since the last call."""
        lines = []
        for images in (self.train_images, self.test_images):
            if isinstance(images, ImageFiles):
                lines += [f"skipped: {error}" for error in images.skipped.values() if error]
                images.skipped.update(dict.fromkeys(images.skipped))
        return lines

    def describe(self):
        """One line: name, numbers of images, in all and a class, their size, and the sum of the label array."""
        def count(labels):
            least, most = np.unique(np.bincount(labels))[[0, -1]].tolist()
            return f"{len(labels):,} ({least:,}{f' to {most:,}' if most > least else ''} a class)"

        unlabeled = len(self.train_labels) - self.num_train
        return (f"{self.name}: {count(self.train_labels[:self.num_train])} training"
                + (f", {unlabeled:,} without a class" if unlabeled else "") + f" and {count(self.test_labels)} test images of "
                f"{self.image_size}x{self.image_size}, {self.num_classes} classes, "
                f"SHA-256 of the labels {self.labels_sha256}")


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def load_dataset(name, root, image_size=None, flip=False, num_workers=0, *, memory=None, skip_corrupt=False, statistics=None,
                 stop=lambda: False, download=True):
    """The whole data set, in memory on the CPU if it can be.

    Args:
        name: a key of DATASETS.  Those of torchvision are read from root, downloaded if they are not there, and checked by
            MD5; "digits" needs no file; "folder" reads root/{train,test}/<class>/* and, if it is there, root/unlabeled;
            "imagenet" reads root/{train,val}/<class>/*.
        image_size: S, for "folder", "imagenet" and "stl10" only (default: 32, 224, 96).
        flip: whether training flips images of "folder".
        num_workers: how many processes decode images of "folder" and "imagenet"; 0: this one.
        memory: bytes that the decoded images of "folder" may take, else they are read from disk when they are needed;
            None: any number.  "imagenet" is always read from disk.
        skip_corrupt: for both: read from disk, and pass over files that cannot be read.
        statistics: mean and std (3,) if they are known; measuring those of "folder" on disk reads every training image.
        stop: once this is true, waiting for a process that decodes ends in InterruptedError.
        download: whether missing files may be downloaded into root, which is made; False where root comes from a file that
            somebody else may have made.

    Raises DataError if files are missing or damaged, or the data cannot be trained on.
    """
    if name not in DATASETS:
        raise DataError(f"no data set is named {name!r}; choose from {', '.join(DATASETS)}")
    row = DATASETS[name]
    train, test, class_names, *more = LOADERS[row.loader](
        row, Path(root), name=name, image_size=image_size or row.image_size, num_workers=num_workers, memory=memory,
        skip_corrupt=skip_corrupt, stop=stop, download=download)
    train_images, train_labels, test_images, test_labels = (
        torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array for array in (*train, *test))
    for split, images, labels in (("training", train_images, train_labels), ("test", test_images, test_labels)):
        if error := find_error(images, labels, class_names, UNLABELED if split == "training" else 0):
            raise DataError(f"{name} under {root}: {split} set: {error}")
    mean, std = map(torch.tensor, (row.mean, row.std)) if row.mean else statistics or measure(train_images)
    return Images(name, train_images, train_labels, test_images, test_labels, tuple(class_names), mean, std,
                  flip if name == "folder" else row.flip, *more)


def load_without_classes(name, root, image_size, num_workers, skip_corrupt, class_names, mean, std):
    """The image files in a folder, at any depth, as test images that have no class, to be decoded as those of a data set are;
    None if there is none.  They are read from disk; class_names, mean and std are those of a run."""
    ignored, row = {}, DATASETS[name]
    paths = list_images(root, ignored, nested=True)
    if not paths:
        return None
    files = ImageFiles(paths, image_size, Workers(num_workers), row.resized_crop, skip_corrupt)
    return Images(name, files[:0], torch.empty(0, dtype=torch.int64), files, torch.full((len(paths),), UNLABELED),
                  tuple(class_names), mean, std, row.flip, test_files=tuple(paths), ignored=describe_ignored(ignored, root))


def find_error(images, labels, class_names, least):
    """What keeps images and labels, at least `least`, from being trained on, or None."""
    if isinstance(images, torch.Tensor) and (images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3
                                             or images.shape[2] != images.shape[3]):
        return f"its images are {images.dtype} of shape {tuple(images.shape)}: expected uint8 (N, 3, S, S)"
    if labels.dtype != torch.int64 or labels.shape != (len(images),):
        return f"{len(labels)} labels of type {labels.dtype} for {len(images)} images"
    if len(odd := labels[(labels < least) | (labels >= len(class_names))]):
        return f"the label {odd[0]} is not one of {len(class_names)} classes"
    counts = torch.bincount(labels[labels >= 0], minlength=len(class_names)).tolist()
    if 0 in counts:
        return f"no image of class {class_names[counts.index(0)]}"
    return None


def measure(images):
    """Mean and standard deviation (3,) of pixels in [0, 1]; constant channels get 1."""
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for _, pixels in ordered_batches(images):
        counts += torch.stack([torch.bincount(pixels[:, c].flatten(), minlength=256) for c in range(3)])
    values = torch.arange(256, dtype=torch.float64) / 255
    frequencies = counts / counts.sum(dim=1, keepdim=True)
    mean = frequencies @ values
    std = (frequencies @ values.square() - mean.square()).clamp_min(0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


def load_digits(row, root, **_):
    """1,797 handwritten digits of 8x8 pixels, resized to 16x16; 5 of every 18 are the 500 test images."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=16, mode="bilinear").round().byte().expand(-1, 3, -1, -1).numpy()
    labels = digits.target.astype(np.int64)
    test = np.arange(len(labels)) % 18 < 5
    return (images[~test], labels[~test]), (images[test], labels[test]), list("0123456789")


def load_cifar(row, root, *, download, **_):
    train, test = fetch(row, root, download, {"train": True}, {"train": False})
    return *((data.data.transpose(0, 3, 1, 2), np.array(data.targets)) for data in (train, test)), train.classes


def load_svhn(row, root, *, download, **_):
    train, test = fetch(row, root, download, {"split": "train"}, {"split": "test"})
    return *((data.data, data.labels) for data in (train, test)), list("0123456789")


def load_stl10(row, root, *, download, image_size, **_):
    """5,000 training and 8,000 test images of 96x96 pixels, resized, and 100,000 training images without a class."""
    train, test = fetch(row, root, download, {"split": "train+unlabeled"}, {"split": "test"})
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    return *((resize(data.data, image_size), data.labels.astype(np.int64)) for data in (train, test)), names


def resize(images, size):
    """uint8 (N, 3, size, size), a tensor, of uint8 (N, 3, S, S), an array: bilinear and antialiased, as Pillow does it."""
    resized = torch.empty((len(images), 3, size, size), dtype=torch.uint8)
    for i in range(0, len(images), 1000):
        pixels = torch.from_numpy(np.ascontiguousarray(images[i:i + 1000]))
        if size != pixels.shape[-1]:
            pixels = torch.nn.functional.interpolate(pixels.float(), size=size, mode="bilinear", antialias=True).round()
        resized[i:i + 1000] = pixels
    return resized


def fetch(row, root, download, *splits):
    """The torchvision data sets of a row, one for the arguments of each split; files that are there need no network.

    torchvision checks the MD5 of the files before it reads or replaces them.
    """
    source = getattr(import_module("torchvision.datasets"), row.source)
    try:
        return [source(root, download=download, **split) for split in splits]
    except (OSError, RuntimeError) as error:
        if not download:
            raise DataError(f"{row.source} is not under {root}, where the checkpoint says that it was: say where it lies, "
                            "or may be downloaded to, with --data-path") from None
        if hasattr(source, "split_list"):       # SVHN, which has a file for each split
            files = [source.split_list[split["split"]][1:] for split in splits]
        else:
            files = [(f"{source.base_folder}/{name}", md5) for name, md5 in source.train_list + source.test_list]
        for name, md5 in files:
            path = root / name
            if not path.is_file():
                raise DataError(f"{path} is missing and could not be downloaded ({error}): put the file with "
                                f"MD5 {md5} there, or use --dataset digits, which needs no network") from None
            if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5:
                raise DataError(f"{path} is damaged (its MD5 is not {md5}) and could not be downloaded again "
                                f"({error}): replace it") from None
        raise DataError(f"{root}: {error}") from None


LOADERS = {"cifar": load_cifar, "svhn": load_svhn, "stl10": load_stl10, "digits": load_digits, "folder": load_folder}
