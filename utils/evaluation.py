"""How well a network does: in the course of a run, and of a finished one for `train_meta.py --evaluate`."""
from pathlib import Path

import torch

from datasets import DATASETS, DataError, data_digest, load_without_classes, normalized_batches
from datasets.table import UNLABELED
from utils import checkpoint
from utils.cli import option
from utils.device import choose_device, set_precision, slow_precision
from utils.errors import Diverged, RunFailure, UsageError, printable
from utils.experiment import check_arch, differing
from utils.files import CHECKPOINT, csv_text, write_text
from utils.flags import defaults
from utils.setup import describe_missing, load_images, load_model
from utils.trial import logits_of, network_failures, try_network

MOST_CLASSES = 20       # whose confusion matrix is printed


def evaluate(model, batches, dtype=None, stop=lambda: False, all_reduce_sum=lambda numbers: numbers):
    """Returns {"accuracy"} in [0, 1] over batches of (x, y), in evaluation mode; None if `stop()` became true on the way.

    With more than ten classes there is "top5" as well, the share of images whose class is among the five likeliest.
    dtype: for autocast, or None.  all_reduce_sum: a function from a list of numbers to their sums over the processes, if each
    has a shard of one set.  Raises Diverged if logits are not finite.
    """
    correct = among_five = torch.tensor(0)
    count, many, stopped = 0, False, False
    model.eval()
    for x, y in batches:
        if stopped := stop():
            break
        if len(y) == 0:                 # fewer images than processes
            continue
        logits = check_finite(logits_of(model, x, dtype))
        correct, count = correct + (logits.argmax(dim=1) == y).sum(), count + len(y)
        if many := logits.shape[1] > 10:
            among_five = among_five + (logits.topk(5, dim=1).indices == y[:, None]).sum()
    correct, among_five, count, many, stopped = all_reduce_sum([correct.item(), among_five.item(), count, many, stopped])
    if stopped:
        return None
    return {"accuracy": correct / count} | ({"top5": among_five / count} if many else {})


def predict(model, batches, dtype=None):
    """Returns predicted classes (N,) int64 and probabilities (N, K) float32, on the CPU; batches, Diverged: as `evaluate`."""
    predicted, probabilities = [], []
    model.eval()
    for x, _ in batches:
        logits = check_finite(logits_of(model, x, dtype))
        predicted.append(logits.argmax(dim=1).cpu())
        probabilities.append(logits.float().softmax(dim=1).cpu())
    return torch.cat(predicted), torch.cat(probabilities)


def check_finite(logits):
    """Returns logits (B, K) themselves.  Raises Diverged unless they are finite: the argmax of others is no prediction."""
    if broken := int((~logits.isfinite().all(dim=1)).sum()):
        raise Diverged(f"the logits of {broken:,} of {len(logits):,} images are not finite in evaluation mode")
    return logits


def measure_sets(state, images, dtype, world, stop, *names):
    """Returns accuracies in [0, 1] by tag, such as "test/accuracy" and "test/top5"; None if `stop()` became true on the way.

    Each process of a world measures a shard of every set, and all get the same answers.  Nothing is augmented.
    names: of sets, "test", "validation" and "labeled"; an empty one has no tag.

    Raises Diverged, which names the step, as `evaluate` does, and RunFailure if the network or the images fail.
    """
    scalars = {}
    for name in names:
        x, y = images.test_images, images.test_labels
        if name != "test":
            x, y = (values[getattr(state, name)] for values in (images.train_images, images.train_labels))
        if len(y) == 0:
            continue
        batches = normalized_batches(world.shard(x), world.shard(y), images.mean, images.std, state.device)
        try:
            with network_failures(state.args["arch"], state.step):
                measured = evaluate(state.model, batches, dtype, stop, world.all_reduce_numbers)
        except Diverged as error:
            raise Diverged(f"{error} at step {state.step}") from None
        except (DataError, OSError) as error:
            raise RunFailure(error) from None
        if measured is None:
            return None
        scalars |= {f"{name}/{key}": value for key, value in measured.items()}
    return scalars


def evaluate_file(args, sums):
    """Prints what the checkpoint or state dict args.evaluate achieves; writes args.predictions, if given.  Returns 0.

    args.evaluate: a file, or the folder of a run.  sums: of `NamedFiles`.
    """
    path = args.evaluate / CHECKPOINT if args.evaluate.is_dir() else args.evaluate
    name, device = f"argument --evaluate: {path}", choose_device(args.device)
    saved = checkpoint.load(path, bare=True)
    flags = evaluation_flags(args, sums, saved, path)
    arch, precision = flags["arch"], flags["precision"]
    dtype = set_precision(precision, device)
    if slow := slow_precision(precision, device):
        print(slow)
    images, said = find_images(args, flags, saved, path, device)
    warned = try_network(arch, images.num_classes, images.image_size, device, dtype, trains=False)
    model = load_model(arch, images.num_classes, device, saved["model"], name)
    try:
        with network_failures(arch):
            predicted, probabilities = predict(model, normalized_batches(images.test_images, images.test_labels, images.mean,
                                                                         images.std, device), dtype)
    except Diverged as error:
        raise UsageError(f"{name}: {error}") from None

    step = f" of step {saved['step']}" if "step" in saved else ", a state dict"
    lines = [*warned, f"{path}{step}: {arch} on {device.type}, {precision}", said, *describe_missing(images)]
    if args.predictions:
        write_predictions(args.predictions, images, predicted, probabilities)
        lines.append(f"{args.predictions}: {len(predicted):,} predictions")
    print("\n".join(map(printable, lines)))
    if UNLABELED not in images.test_labels:
        print("\n".join(report(images.test_labels, predicted, list(map(printable, images.class_names)))))
    return 0


def find_images(args, flags, saved, path, device):
    """Returns the images to measure, and a line about them.

    They are those of a data set, or of a photo or a folder without classes: where --data-path names it, and nothing of the data
    set of the checkpoint lies in there, but images do.
    """
    root, name, trained = Path(flags["data_path"]), flags["dataset"], "args" in saved
    places = (*DATASETS[name].folders, DATASETS[name].place)
    if trained and args.data_path and not any(place and (root / place).exists() for place in places):
        images = load_without_classes(name, root, saved["image_size"], flags["num_workers"], flags["skip_corrupt"],
                                      saved["class_names"], saved["mean"], saved["std"])
        if images is None and (args.predictions or not root.is_dir()):
            raise UsageError(f"argument --data-path: {root} is no image, and holds neither one nor anything of {name}: give a "
                             "folder of images, or one image")
        if images and not args.predictions:
            raise UsageError(f"argument --data-path: {root} holds images without classes, so there is no accuracy to measure: "
                             "add --predictions FILE.csv")
        if images:
            return images, f"{root}: {len(images.test_labels):,} images without a class: there is no accuracy to measure"

    images = load_images(flags, device, saved, download=bool(args.data_path) or not trained)
    said = (f"test set of {name}" + (f" under {root}" if images.test_files else "")
            + f": {len(images.test_labels):,} images, {images.num_classes} classes")
    if trained and list(images.class_names) != saved["class_names"]:
        raise DataError(f"argument --data-path: {root} has other classes than {path} was trained on")
    others = [part for part in differing(data_digest(images), saved["data"]) if "test" in part] if trained else []
    if others and not args.data_path:
        raise UsageError(f"argument --{'num-test' if args.num_test else 'data-path'}: {root} is not what {path} was tested on: "
                         f"the {', '.join(others)} differ: give a folder by --data-path to measure what is in there")
    return images, said + (f"; not what the run was tested on: the {', '.join(others)} differ" if others else "")


def evaluation_flags(args, sums, saved, path):
    """Returns name -> value of the flags: what the command line gives, else the checkpoint, else the default."""
    then, given = saved.get("args", {}), {name: value for name, value in vars(args).items() if value is not None}
    flags = defaults() | then | given
    if then:
        check_arch(then["arch"], saved["files"], path, {args.arch: sums.get("arch")} if args.arch else {})
        for name in ("dataset", "image_size"):
            if flags[name] != then[name]:
                raise UsageError(f"argument {option(name)}: {flags[name]}, but {path} was trained with {then[name]}: "
                                 "leave it out")
    if args.data_path and flags["num_test"] and not args.num_test:
        _, tests = DATASETS[flags["dataset"]].folders
        flags["num_test"] *= not (args.data_path / tests).is_dir()          # 0: this folder has test images of its own
    return flags


def report(labels, predicted, names):
    """Yields parts of a text about predictions: accuracy and error, report of each class and confusion matrix, of scikit-learn.

    labels, predicted: (N,) class indices.  names: of the K classes.
    """
    right = int((predicted == labels).sum())
    yield (f"accuracy {100 * right / len(labels):.2f} %, error {100 * (1 - right / len(labels)):.2f} % ({right:,} of "
           f"{len(labels):,} are right)\n")
    try:
        from sklearn.metrics import classification_report, confusion_matrix  # takes a second to load
    except ImportError:
        yield "the report of each class needs scikit-learn: pip install scikit-learn"
        return
    every = range(len(names))
    yield classification_report(labels, predicted, labels=every, target_names=names, digits=4, zero_division=0)
    if len(names) <= MOST_CLASSES:
        yield "confusion matrix: a row for each true class, a column for each predicted one, in the same order"
        width, cell = max(map(len, names)), max(3, len(str(len(labels))))
        for name, row in zip(names, confusion_matrix(labels, predicted, labels=every)):
            yield f"{name:{width}}  " + "  ".join(f"{count:{cell}}" for count in row)


def write_predictions(path, images, predicted, probabilities):
    """Writes a CSV file with a row for each test image: file, predicted class and name, confidence, the true class and name
    where they are known, and the probability of each class.

    A text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    def cell(value):
        if isinstance(value, float):
            return f"{value:.9g}"
        return f"'{value}" if str(value).startswith(("=", "+", "-", "@", "\t", "\r")) else value

    names, known = images.class_names, UNLABELED not in images.test_labels
    rows = [["file", "predicted", "predicted_name", "confidence", *(["label", "label_name"] if known else []), *names]]
    files = images.test_files or range(len(predicted))          # a data set without files: the number of the image
    for file, guess, label, p in zip(files, predicted.tolist(), images.test_labels.tolist(), probabilities.tolist()):
        rows.append([file, guess, names[guess], p[guess], *([label, names[label]] if known else []), *p])
    write_text(path, csv_text(map(cell, row) for row in rows))
