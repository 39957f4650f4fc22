"""One row per data set.  Nothing else may switch on a name."""
import os
from typing import NamedTuple

UNLABELED = -1          # stands for the class of a training image that has none; such images come after all others
HEAP = "unlabeled"      # the folder of such images, beside those of class folders


class DataError(ValueError):
    """Data that is missing, damaged or contradictory; the message names the file and the remedy."""


class DatasetInfo(NamedTuple):
    loader: str                         # key of datasets.loading.LOADERS
    source: str | None = None           # class of torchvision.datasets
    place: str | None = None            # file or folder of those, under --data-path
    num_classes: int | None = None      # None: read from the data
    num_train: int | None = None
    mean: tuple | None = None           # per channel, of pixels in [0, 1]; None: measured on the training images
    std: tuple | None = None
    folders: tuple = ()                 # of class folders: that of the training images and that of the test images
    unlabeled: bool = False             # training images without a class: HEAP, if it is there, or in the source
    resized: bool = False               # whether --image-size has a say
    image_size: int = 32                # if it says nothing
    resized_crop: bool = False          # training takes torchvision's RandomResizedCrop rather than pad and crop
    flip: bool = False                  # digits and house numbers are not mirror-symmetric


DATASETS = {
    "cifar10": DatasetInfo("cifar", "CIFAR10", "cifar-10-batches-py", 10, 50_000,
                   (.49139968, .48215841, .44653091), (.24703223, .24348513, .26158784), flip=True),
    "cifar100": DatasetInfo("cifar", "CIFAR100", "cifar-100-python", 100, 50_000,
                    (.50707516, .48654887, .44091784), (.26733429, .25643846, .27615047), flip=True),
    "svhn": DatasetInfo("svhn", "SVHN", "test_32x32.mat", 10, 73_257,
                        (.4376821, .4437697, .47280442), (.19803012, .20101562, .19703614)),
    "stl10": DatasetInfo("stl10", "STL10", "stl10_binary", 10, 5_000, unlabeled=True, resized=True, image_size=96, flip=True),
    "digits": DatasetInfo("digits", num_classes=10, num_train=1_297),
    "folder": DatasetInfo("folder", folders=("train", "test"), unlabeled=True, resized=True),
    "imagenet": DatasetInfo("folder", mean=(.485, .456, .406), std=(.229, .224, .225), folders=("train", "val"), resized=True,
                            image_size=224, resized_crop=True, flip=True),
}


def has_unlabeled(name, root):
    """Whether a data set comes with training images that have no class."""
    row = DATASETS[name]
    return row.unlabeled and (not row.folders or os.path.lexists(root / HEAP))


def is_under(name, root):
    """Whether something of a data set lies in a folder."""
    row = DATASETS[name]
    return any(place and (root / place).exists() for place in (*row.folders, row.place))


def check_root(name, root):
    """Raises DataError unless the folders that a data set is read from are there."""
    folders = DATASETS[name].folders
    if folders and has_unlabeled(name, root) and not (root / HEAP).is_dir():
        raise DataError(f"argument --data-path: {root / HEAP} is not a folder: put images without a class in it, or remove it")
    for folder in folders:
        if not (root / folder).is_dir():
            raise DataError(f"argument --data-path: {root / folder} is not a folder: --dataset {name} reads "
                            + " and ".join(f"{folder}/<class>/*" for folder in folders) + " under it")
