"""One row per data set.  Nothing else may switch on a name."""
import os
from typing import NamedTuple

UNLABELED = -1                      # stands for the class of a training image that has none; such images come after all others
UNLABELED_FOLDER = "unlabeled"      # of such images, beside the folders of those with a class


class DataError(ValueError):
    """Data that is missing, damaged or contradictory; the message names the file and the remedy."""


class DatasetInfo(NamedTuple):
    """What is known of a data set before it is read."""

    loader: str                         # key of datasets.loading.LOADERS
    torchvision: str | None = None      # class of torchvision.datasets
    place: str | None = None            # file or folder of those, under --data-path
    splits: tuple = ("train", "test")   # what that class calls the training and the test images
    class_names: tuple = ()             # none: read from the data
    num_classes: int | None = None      # None: read from the data
    num_train: int | None = None
    mean: tuple | None = None           # per channel, of pixels in [0, 1]; None: measured on the training images
    std: tuple | None = None
    folders: tuple = ()                 # of class folders: that of the training images and that of the test images
    unlabeled: bool = False             # has training images without a class, or takes those in UNLABELED_FOLDER
    resized: bool = False               # accepts --image-size
    image_size: int = 32                # without it
    resized_crop: bool = False          # training takes torchvision's RandomResizedCrop rather than pad and crop
    flip: bool = False                  # digits and house numbers are not mirror-symmetric


STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
DATASETS = {
    "cifar10": DatasetInfo("torchvision", "CIFAR10", "cifar-10-batches-py", (True, False), num_classes=10, num_train=50_000,
                           mean=(.49139968, .48215841, .44653091), std=(.24703223, .24348513, .26158784), flip=True),
    "cifar100": DatasetInfo("torchvision", "CIFAR100", "cifar-100-python", (True, False), num_classes=100, num_train=50_000,
                            mean=(.50707516, .48654887, .44091784), std=(.26733429, .25643846, .27615047), flip=True),
    "svhn": DatasetInfo("torchvision", "SVHN", "test_32x32.mat", class_names=tuple("0123456789"), num_classes=10,
                        num_train=73_257, mean=(.4376821, .4437697, .47280442), std=(.19803012, .20101562, .19703614)),
    "stl10": DatasetInfo("torchvision", "STL10", "stl10_binary", ("train+unlabeled", "test"), STL10_CLASSES, num_classes=10,
                         num_train=5_000, unlabeled=True, resized=True, image_size=96, flip=True),
    "digits": DatasetInfo("digits", num_classes=10, num_train=1_297),
    "folder": DatasetInfo("folder", folders=("train", "test"), unlabeled=True, resized=True),
    "imagenet": DatasetInfo("folder", mean=(.485, .456, .406), std=(.229, .224, .225), folders=("train", "val"), resized=True,
                            image_size=224, resized_crop=True, flip=True),
}


def has_unlabeled(name, root):
    """Returns whether a data set comes with training images that have no class."""
    row = DATASETS[name]
    return row.unlabeled and (not row.folders or os.path.lexists(root / UNLABELED_FOLDER))


def check_root(name, root, num_test=0):
    """Raises DataError unless the folders of a data set are there, with num_test all but that of the test images."""
    folders = DATASETS[name].folders
    if not folders:
        if num_test:
            raise DataError(f"argument --num-test: {name} has a test set of its own: leave it out")
        return
    train, test, unlabeled = (root / folder for folder in (*folders, UNLABELED_FOLDER))
    if num_test and os.path.lexists(test):
        raise DataError(f"argument --num-test: {test} has the test images: leave --num-test out, or rename that folder")
    for folder in (train, *[test] * (not num_test), *[unlabeled] * has_unlabeled(name, root)):
        if not folder.is_dir():
            raise DataError(f"argument --data-path: {folder} is not a folder: --dataset {name} reads {train.name}/<class>/* "
                            f"and {test.name}/<class>/* under {root}; --num-test N holds N images of {train.name}/ out instead")
