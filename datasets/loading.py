"""From files, or scikit-learn's own digits, to one uint8 tensor per split."""
import hashlib
import os
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.decoding import Workers, decode_files, list_images
from datasets.streaming import Files, most_images
from datasets.table import DATASETS, DataError, check_root


class Images(NamedTuple):
    name: str
    train_images: torch.Tensor | Files  # (N, 3, H, W) uint8
    train_labels: torch.Tensor          # (N,) int64
    test_images: torch.Tensor | Files   # (M, 3, H, W) uint8
    test_labels: torch.Tensor           # (M,) int64
    class_names: tuple
    mean: torch.Tensor                  # (3,) of pixels in [0, 1]
    std: torch.Tensor                   # (3,)
    flip: bool                          # whether training flips images at random
    source: str = ""                    # of "folder" and "imagenet": where the pixels are kept, and why
    test_files: tuple = ()              # M paths, likewise
    ignored: str = ""                   # how many entries of their folders are not taken for images, and why; or nothing
    files: dict = {}                    # likewise, what `list_files` says of them

    @property
    def num_classes(self):
        return len(self.class_names)

    @property
    def labels_sha256(self):
        """Of the training labels as little-endian int64: the data set that a split's indices speak of."""
        return hashlib.sha256(self.train_labels.numpy().astype("<i8").tobytes()).hexdigest()

    @property
    def digest(self):
        """What the data are, wherever they lie: name -> SHA-256, or text.  Two of them are compared in the names that both
        hold: there are pixels of images in memory, names and sizes of files."""
        held = {"class names": "/".join(self.class_names), "training labels": self.labels_sha256,
                "test labels": hashlib.sha256(self.test_labels.numpy().astype("<i8").tobytes()).hexdigest(), **self.files}
        for part, images in (("training", self.train_images), ("test", self.test_images)):
            if not isinstance(images, Files):
                held[f"{part} pixels"] = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()
        return held

    @property
    def padding(self):
        """Of the random crop, in pixels: 4 at 32, as in the paper; 0 where a random resized crop takes its place."""
        return 0 if getattr(self.train_images, "resized_crop", False) else self.train_images.shape[-1] // 8

    def skipped(self):
        """Lines about images that were skipped since the last call."""
        files = [part.skipped for part in (self.train_images, self.test_images) if isinstance(part, Files)]
        lines = [f"skipped: {fault}" for skipped in files for fault in skipped.values() if fault]
        for skipped in files:
            skipped.update(dict.fromkeys(skipped, None))
        return lines

    def describe(self):
        """One line: name, numbers of images, in all and a class, their size, and the sum of the label array."""
        def count(labels):
            least, most = np.unique(np.bincount(labels))[[0, -1]].tolist()
            return f"{len(labels):,} ({least:,}{f' to {most:,}' if most > least else ''} a class)"

        return (f"{self.name}: {count(self.train_labels)} training and {count(self.test_labels)} test images of "
                f"{self.train_images.shape[-1]}x{self.train_images.shape[-1]}, {self.num_classes} classes, "
                f"SHA-256 of the labels {self.labels_sha256}")


def load_dataset(name, root, image_size=None, flip=False, num_workers=0, *, memory=None, skip_corrupt=False, statistics=None,
                 stop=lambda: False, download=True):
    """The whole data set, in memory on the CPU if it can be.

    Args:
        name: a key of DATASETS.  "cifar10", "cifar100" and "svhn" are read from root, downloaded if they are not
            there, and checked by MD5; "digits" needs no file; "folder" reads root/{train,test}/<class>/* and
            "imagenet" root/{train,val}/<class>/*.
        root: where the files lie.
        image_size, flip, num_workers: for "folder" and "imagenet" only: images become image_size x image_size pixels
            (default 32; 224), those of "folder" are flipped in training on demand, that many processes decode them.
        memory: bytes that the decoded images of "folder" may take, else they are read from disk when they are needed;
            None: any number.  "imagenet" is always read from disk.
        skip_corrupt: for both: read from disk, and pass over files that cannot be read.
        stop: once this is true, waiting for a process that decodes ends in InterruptedError.
        statistics: mean and std (3,) if they are known; measuring those of "folder" on disk reads every training image.
        download: whether files that are not there may be downloaded into root, which is made; False where root comes from
            a file that somebody else may have made.

    Raises:
        DataError: if files are missing or damaged, or the data cannot be trained on.
    """
    if name not in DATASETS:
        raise DataError(f"no data set is named {name!r}; choose from {', '.join(DATASETS)}")
    row, options = DATASETS[name], ()
    if row.loader == "folder":
        options = (name, image_size or row.image_size, num_workers, memory, skip_corrupt, stop)
    elif row.source:
        options = (download,)
    train, test, class_names, *more = LOADERS[row.loader](row, Path(root), *options)
    train_images, train_labels, test_images, test_labels = (
        part if isinstance(part, Files) else torch.from_numpy(np.ascontiguousarray(part)) for part in (*train, *test))
    for split, images, labels in (("training", train_images, train_labels), ("test", test_images, test_labels)):
        fault = find_fault(images, labels, class_names)
        if fault:
            raise DataError(f"{name} under {root}: {split} set: {fault}")
    if row.mean is not None:
        mean, std = torch.tensor(row.mean), torch.tensor(row.std)
    else:
        mean, std = statistics or measure(train_images)
    return Images(name, train_images, train_labels, test_images, test_labels, tuple(class_names), mean, std,
                  flip if name == "folder" else row.flip, *more)


def find_fault(images, labels, class_names):
    """What keeps images and labels from being trained on, or None."""
    if images.dtype != torch.uint8 or len(images.shape) != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        return f"its images are {images.dtype} of shape {tuple(images.shape)}: expected uint8 (N, 3, H, H)"
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        return f"{len(labels)} labels of type {labels.dtype} for {len(images)} images"
    odd = labels[(labels < 0) | (labels >= len(class_names))]
    if len(odd):
        return f"the label {odd[0]} is not one of {len(class_names)} classes"
    empty = (torch.bincount(labels, minlength=len(class_names)) == 0).nonzero().flatten().tolist()
    if empty:
        return f"no image of class {class_names[empty[0]]}"
    return None


def measure(images):
    """Mean and standard deviation (3,) of pixels in [0, 1]; constant channels get 1."""
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for part in images.split(most_images(images)):
        pixels = part[1] if isinstance(images, Files) else part
        counts += torch.stack([torch.bincount(pixels[:, c].flatten(), minlength=256) for c in range(3)])
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(dim=1, keepdim=True)
    mean = share @ values
    std = (share @ values.square() - mean.square()).clamp_min(0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


def load_digits(row, root):
    """1,797 handwritten digits of 8x8 pixels, resized to 16x16; 5 of every 18 are the 500 test images."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=16, mode="bilinear").round().byte().expand(-1, 3, -1, -1).numpy()
    labels = digits.target.astype(np.int64)
    test = np.arange(len(labels)) % 18 < 5
    return (images[~test], labels[~test]), (images[test], labels[test]), [str(k) for k in range(10)]


def load_cifar(row, root, download):
    source = getattr(import_module("torchvision.datasets"), row.source)
    files = [(root / source.base_folder / name, md5) for name, md5 in source.train_list + source.test_list]
    train, test = (fetch(files, source, root, download, train=part) for part in (True, False))
    return *((part.data.transpose(0, 3, 1, 2), np.array(part.targets)) for part in (train, test)), train.classes


def load_svhn(row, root, download):
    source = getattr(import_module("torchvision.datasets"), row.source)
    files = [(root / source.split_list[part][1], source.split_list[part][2]) for part in ("train", "test")]
    train, test = (fetch(files, source, root, download, split=part) for part in ("train", "test"))
    return *((part.data, np.array(part.labels, dtype=np.int64)) for part in (train, test)), [str(k) for k in range(10)]


def fetch(files, source, root, download, **kwargs):
    """A torchvision data set; files that are already there are used without a network.

    files: (path, MD5) of each, checked by torchvision before it reads or replaces them.
    """
    try:
        return source(root, download=download, **kwargs)
    except (OSError, RuntimeError) as error:
        if not download:
            raise DataError(f"{source.__name__} is not under {root}, where the checkpoint says that it was: say where it lies, "
                            "or may be downloaded to, with --data-path") from None
        for path, md5 in files:
            if not path.is_file():
                raise DataError(f"{path} is missing and could not be downloaded ({error}): put the file with "
                                f"MD5 {md5} there, or use --dataset digits, which needs no network") from None
            if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5:
                raise DataError(f"{path} is damaged (its MD5 is not {md5}) and could not be downloaded again "
                                f"({error}): replace it") from None
        raise DataError(f"{root}: {error}") from None


def load_folder(row, root, name, image_size, num_workers, memory, skip_corrupt, stop):
    """root/<part>/<class>/* of both parts of a data set, images of any size and of the types in `decoding.FORMATS`."""
    check_root(name, root)
    class_names, parts, ignored, files = None, [], {}, {}
    for folder in (root / part for part in row.parts):
        names = []
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if entry.is_dir() and not entry.name.startswith("."):
                names.append(entry.name)
            else:
                ignored.setdefault("outside a class folder", []).append(entry)
        if class_names is not None and names != class_names:
            odd = sorted(set(names) ^ set(class_names))
            raise DataError(f"{root}: {' and '.join(row.parts)} must have the same classes, but only one has "
                            f"{', '.join(odd[:5])}")
        if len(names) < 2:
            raise DataError(f"{folder} has {len(names)} class folders: at least 2 are needed")
        class_names = names
        found = [list_images(folder / k, ignored) for k in names]
        parts.append(([path for paths in found for path in paths],
                      np.repeat(np.arange(len(names), dtype=np.int64), [len(paths) for paths in found])))
        files |= list_files("test" if parts[1:] else "training", folder, parts[-1][0], skip_corrupt)
    (train, train_labels), (test, test_labels) = parts
    ignored = "; ".join(f"{len(paths):,} {reason} ({os.path.relpath(paths[0], root)!r}{', ...' * (len(paths) > 1)})"
                        for reason, paths in ignored.items())

    size = (len(train) + len(test)) * 3 * image_size ** 2
    needed = f"{size / 1e9:,.2f} GB as pixels"
    if not (row.resized_crop or skip_corrupt or memory is not None and size > memory):
        pixels = decode_files(train + test, image_size, num_workers)
        return ((pixels[:len(train)], train_labels), (pixels[len(train):], test_labels), class_names,
                f"in memory: {needed}", tuple(test), ignored, files)
    why = ("random resized crops need the files" if row.resized_crop else "--skip-corrupt" if skip_corrupt
           else f"they may take {memory / 1e9:,.2f} GB of memory")
    workers = Workers(num_workers, stop)
    crop = "center" if row.resized_crop else None
    train, test = (Files(paths, image_size, workers, crop, row.resized_crop, skip_corrupt) for paths in (train, test))
    return ((train, train_labels), (test, test_labels), class_names,
            f"read from disk by {num_workers or 'no'} worker{'s' * (num_workers != 1)}: {needed}, {why}", tuple(test.paths),
            ignored, files)


def list_files(part, folder, paths, skip_corrupt):
    """SHA-256 of the names of a part's files, as under its folder, and of their sizes: name -> text.

    With skip_corrupt there are no sizes: a file may have been damaged, or replaced, since.
    """
    names = [path[len(str(folder)):] for path in paths]
    held = {f"names of {part} files": hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()}
    if not skip_corrupt:
        sizes = [os.path.getsize(path) if os.path.exists(path) else None for path in paths]
        held[f"sizes of {part} files"] = hashlib.sha256(repr(sizes).encode()).hexdigest()
    return held


LOADERS = {"cifar": load_cifar, "svhn": load_svhn, "digits": load_digits, "folder": load_folder}
