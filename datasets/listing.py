"""What lies in the folders root/<split>/<class>/* and root/unlabeled/**: images, classes, and what is neither."""
import os

from datasets.decoding import readable_formats
from datasets.table import DATASETS, UNLABELED, UNLABELED_FOLDER, DataError, has_unlabeled


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
    files += [(path, k, True) for k, label in enumerate(class_names) if label in test_names
              for path in list_images(test / label, ignored)]
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
