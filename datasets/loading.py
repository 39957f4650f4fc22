"""A data set by its name: from files, or scikit-learn's own digits, to uint8 images and their labels."""
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from datasets.batches import ordered_batches
from datasets.folder import load_folder
from datasets.images import Images
from datasets.table import DATASETS, DataError, check_root


def load_dataset(name, root, image_size=None, flip=False, num_workers=0, *, memory=None, skip_corrupt=False, left_out=None,
                 num_test=0, statistics=None, download=True):
    """Returns a whole data set, an `images.Images`, in memory on the CPU if it can be.

    Args:
        name: a key of DATASETS.  Those of torchvision are read from root, downloaded if they are not there, and checked by
            MD5; "digits" needs no file; "folder" reads root/{train,test}/<class>/* and, if it is there, root/unlabeled;
            "imagenet" reads root/{train,val}/<class>/*.
        image_size: S, for "folder", "imagenet" and "stl10" only (default: 32, 224, 96).
        flip: whether training flips images of "folder".
        num_workers: how many processes decode images of "folder" and "imagenet"; 0: this one.
        memory: bytes that the images of "folder" may take, else they stay on disk, as those of "imagenet" do; None: any number.
        skip_corrupt: for both: decode every image once, and leave out those that cannot be read, as if they were not there.
        left_out: None, or the names under root, such as "train/ant/1.jpg", of the images to leave out; none is looked for.
        num_test: for both, without a folder of test images: how many images of train/, as many of each class, are held out
            to test on; the same ones whatever the seed of a run.
        statistics: mean and std (3,) if they are known; to measure those of "folder" reads every training image.
        download: whether missing files may be downloaded into root, which is made.

    Raises DataError if files are missing or damaged, or the data cannot be trained on.
    """
    if name not in DATASETS:
        raise DataError(f"no data set is named {name!r}; choose from {', '.join(DATASETS)}")
    row, root = DATASETS[name], Path(root)
    check_root(name, root, num_test)
    images = LOADERS[row.loader](name, root, image_size=image_size or row.image_size, num_workers=num_workers, memory=memory,
                                 skip_corrupt=skip_corrupt, left_out=left_out, num_test=num_test, download=download)
    if len(images.test_labels) == 0:
        unreadable = f", and {len(images.left_out):,} that cannot be read" * bool(images.left_out)
        raise DataError(f"{name} under {root}: no test image{unreadable}: add one")
    untested = [images.class_names[k] for k in np.setdiff1d(np.arange(images.num_classes), images.test_labels)]
    warnings = (f"{len(untested)} of {images.num_classes} classes have no test image: {', '.join(untested)}",) * bool(untested)
    mean, std = map(torch.tensor, (row.mean, row.std)) if row.mean else statistics or measure(images.train_images)
    return images._replace(name=name, mean=mean, std=std, flip=flip if name == "folder" else row.flip, warnings=warnings)


def measure(images):
    """Returns mean and standard deviation (3,) of pixels in [0, 1]; constant channels get the deviation 1."""
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for _, pixels in ordered_batches(images):
        counts += torch.stack([torch.bincount(pixels[:, c].flatten(), minlength=256) for c in range(3)])
    values = torch.arange(256, dtype=torch.float64) / 255
    frequencies = counts / counts.sum(dim=1, keepdim=True)
    mean = frequencies @ values
    std = (frequencies @ values.square() - mean.square()).clamp_min(0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


def load_digits(*_, **__):
    """Returns 1,797 handwritten digits of 8x8 pixels, resized to 16x16; 5 of every 18 are the 500 test images."""
    from sklearn.datasets import load_digits as load

    digits = load()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=16, mode="bilinear").round().byte().expand(-1, 3, -1, -1)
    labels, test = torch.from_numpy(digits.target).long(), torch.arange(len(images)) % 18 < 5
    return Images(images[~test], labels[~test], images[test], labels[test], tuple("0123456789"))


def load_torchvision(name, root, *, image_size, download, **_):
    """Returns the images of a data set of torchvision, resized to image_size."""
    row = DATASETS[name]
    train, test = parts = fetch(row, root, download)
    pixels = [resize(part.data if part.data.shape[1] == 3 else part.data.transpose(0, 3, 1, 2), image_size) for part in parts]
    labels = [torch.from_numpy(np.array(part.labels if hasattr(part, "labels") else part.targets, np.int64)) for part in parts]
    return Images(pixels[0], labels[0], pixels[1], labels[1], tuple(row.class_names or train.classes))


def resize(images, size):
    """Returns uint8 (N, 3, S, S), an array, as a tensor (N, 3, size, size): bilinear and antialiased, as Pillow does it."""
    images = torch.from_numpy(images)
    if size == images.shape[-1]:
        return images.contiguous()
    return torch.cat([F.interpolate(chunk.contiguous().float(), size=size, mode="bilinear", antialias=True).round().byte()
                      for chunk in images.split(1000)])


def fetch(row, root, download):
    """Returns the data sets of torchvision for training and test; files that are there need no network.

    torchvision checks the MD5 of the files before it reads or replaces them.
    """
    library = import_module("torchvision.datasets")
    kind = getattr(library, row.torchvision)
    try:
        return [kind(root, split, download=download) for split in row.splits]
    except (OSError, RuntimeError) as error:
        if not download:
            raise DataError(f"{kind.__name__} is not under {root}, where the checkpoint says that it was: say where it lies, "
                            "or may be downloaded to, with --data-path") from None
        files = ([kind.split_list[split][1:] for split in row.splits] if kind is library.SVHN
                 else kind.train_list + kind.test_list)
        for file, md5 in files:
            path = root / getattr(kind, "base_folder", "") / file
            if not library.utils.check_integrity(path, md5):
                fault = "damaged" if path.is_file() else "missing"
                raise DataError(f"{path} is {fault} and could not be downloaded ({error}): put the file with MD5 {md5} there, "
                                "or use --dataset digits, which needs no network") from None
        raise DataError(f"{root}: {error}") from None


LOADERS = {"torchvision": load_torchvision, "digits": load_digits, "folder": load_folder}
