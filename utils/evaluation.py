"""How well a network does: in the course of a run, and of a finished one for `train_meta.py --evaluate`."""
import csv
import io
from pathlib import Path

import torch

from datasets import DATASETS, DataError, data_digest, load_without_classes, normalized_batches
from datasets.table import is_under
from utils import checkpoint
from utils.cli import option
from utils.device import choose_device, set_precision, slow_precision
from utils.errors import CheckpointError, Diverged, RunFailure, UsageError, printable
from utils.experiment import check_arch, differing
from utils.files import CHECKPOINT, replacing
from utils.flags import FROM_CHECKPOINT, defaults, with_role
from utils.setup import load_images, load_model
from utils.trial import network_failures, try_network

MOST_CLASSES = 20       # whose confusion matrix is printed


@torch.no_grad()
def logits_over(model, batches, dtype=None):
    """Yields logits (B, K) in evaluation mode and y (B,) over batches of (x, y); dtype: for autocast, or None."""
    model.eval()
    for x, y in batches:
        if len(y) == 0:                 # fewer images than processes
            continue
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            logits = model(x)
        yield logits, y


def count_broken(logits):
    """Returns how many rows of logits (B, K) hold something that is not finite, () on their device."""
    return (~logits.isfinite().all(dim=1)).sum()


def refuse_broken(broken, count):
    """Raises Diverged if some of the `count` images have logits that are not finite: their argmax is no prediction."""
    if broken:
        raise Diverged(f"the logits of {broken:,.0f} of {count:,.0f} images are not finite in evaluation mode")


def evaluate(model, batches, dtype=None, stop=lambda: False, all_reduce_sum=lambda numbers: numbers):
    """Returns {"accuracy"} in [0, 1] over batches of (x, y), in evaluation mode; None if `stop()` became true on the way.

    With more than ten classes there is "top5" as well, the share of images whose class is among the five likeliest.
    all_reduce_sum: a function from a list of numbers to their sums over the processes, if each has a shard of one set.
    Raises Diverged if logits are not finite.
    """
    correct = among_five = broken = torch.tensor(0)
    count, many, stopped = 0, False, stop()
    for logits, y in () if stopped else logits_over(model, batches, dtype):
        correct, broken = correct + (logits.argmax(dim=1) == y).sum(), broken + count_broken(logits)
        many = logits.shape[1] > 10
        if many:
            among_five = among_five + (logits.topk(5, dim=1).indices == y[:, None]).sum()
        count += len(y)
        if stopped := stop():
            break
    correct, among_five, broken, count, many, stopped = all_reduce_sum(
        [correct.item(), among_five.item(), broken.item(), count, many, stopped])
    if stopped:
        return None
    refuse_broken(broken, count)
    return {"accuracy": correct / count} | ({"top5": among_five / count} if many else {})


def predict(model, batches, dtype=None):
    """Returns predicted classes (N,) int64 and probabilities (N, K) float32, on the CPU, over the batches (x, y).

    With the same batches as in `evaluate` the same predictions.  Raises Diverged as it does.
    """
    predicted, probabilities, broken = [], [], []
    for logits, y in logits_over(model, batches, dtype):
        if len(logits) != len(y):
            raise ValueError(f"{len(logits)} rows of logits for {len(y)} images")
        broken.append(count_broken(logits))
        predicted.append(logits.argmax(dim=1))
        probabilities.append(logits.float().softmax(dim=1).cpu())
    predicted = torch.cat(predicted).cpu()
    refuse_broken(sum(broken).item(), len(predicted))
    return predicted, torch.cat(probabilities)


class Evaluator:
    """Measures a run in its course, on the test images and, with --num-val, on the validation images.

    Each process of a world measures a shard of every set, and all get the same answers.
    """

    def __init__(self, state, images, device, dtype, world):
        """images: as `load_dataset` returns them."""
        self.state, self.images, self.device, self.dtype, self.world = state, images, device, dtype, world
        self.sets = {"test": (world.shard(images.test_images), world.shard(images.test_labels))}
        if len(state.validation):
            self.sets["validation"] = self.training_images(state.validation)

    def training_images(self, indices):
        """Returns this process's shard of some training images, and their labels."""
        index = self.world.shard(indices)
        return self.images.train_images[index], self.images.train_labels[index]

    def measure(self, x, y, stop):
        """Returns what `evaluate` does of one set; an error of the network or its logits names the step."""
        batches = normalized_batches(x, y, self.images.mean, self.images.std, self.device)
        try:
            with network_failures(self.state.args["arch"], self.state.step):
                return evaluate(self.state.model, batches, self.dtype, stop, self.world.all_reduce_numbers)
        except Diverged as error:
            raise Diverged(f"{error} at step {self.state.step}") from None
        except (DataError, OSError) as error:
            raise RunFailure(error) from None

    def evaluate(self, stop):
        """Returns accuracies in [0, 1] by tag, such as "test/accuracy" and "test/top5"; None if `stop()` became true."""
        scalars = {}
        for name, (x, y) in self.sets.items():
            measured = self.measure(x, y, stop)
            if measured is None:
                return None
            scalars |= {f"{name}/{key}": value for key, value in measured.items()}
        return scalars

    def measure_labeled(self, stop):
        """Returns the accuracy in [0, 1] on the labeled images, without augmentation; None if `stop()` became true."""
        measured = self.measure(*self.training_images(self.state.labeled), stop)
        return measured and measured["accuracy"]


def describe_accuracies(scalars):
    """Returns what `Evaluator.evaluate` measured, in words."""
    return "  ".join(f"{tag.replace('/accuracy', '').replace('/top5', ' top-5')} error {100 * (1 - value):.2f} %"
                     for tag, value in scalars.items())


def evaluate_file(args, sums):
    """Prints what the checkpoint or state dict args.evaluate achieves; writes args.predictions, if given.  Returns 0.

    args.evaluate: a file, or the folder of a run.  sums: of `NamedFiles`.
    """
    path = args.evaluate / CHECKPOINT if args.evaluate.is_dir() else args.evaluate
    name, device = f"argument --evaluate: {path}", choose_device(args.device)
    saved = checkpoint.load(path, bare=True)
    flags = evaluation_flags(args, sums, saved, path)
    trained = "args" in saved           # not a bare state dict
    dtype = set_precision(flags["precision"], device)
    if slow := slow_precision(flags["precision"], device):
        print(slow)
    without_classes = find_images(args, flags, saved)
    images = without_classes or load_images(flags, device, saved, download=bool(args.data_path) or not trained)
    others = []                         # names of what is not as in the run
    if trained and not without_classes:
        if list(images.class_names) != saved["class_names"]:
            raise DataError(f"argument --data-path: {flags['data_path']} has other classes than {path} was trained on")
        others = [part for part in differing(data_digest(images), saved["data"]) if "test" in part]
    if others and not args.data_path:
        raise UsageError(f"argument --data-path: {flags['data_path']} is not what {path} was tested on: the "
                         f"{', '.join(others)} differ: give a folder to measure what is in there")
    warned = try_network(flags["arch"], images.num_classes, images.image_size, device, dtype, trains=False)
    model = load_model(flags["arch"], images.num_classes, device, saved["model"], name)
    count = len(images.test_labels)
    batches = normalized_batches(images.test_images, torch.arange(count), images.mean, images.std, device)
    try:
        with network_failures(flags["arch"]):
            predicted, probabilities = predict(model, batches, dtype)
    except Diverged as error:
        raise CheckpointError(f"{name}: {error}") from None

    names = [printable(text) for text in images.class_names]
    step = f" of step {saved['step']}" if trained else ", a state dict"
    print("\n".join([*warned, printable(f"{path}{step}: {flags['arch']} on {device.type}, {flags['precision']}")]))
    if without_classes:
        print(printable(f"{flags['data_path']}: {count:,} images without a class: there is no accuracy to measure"))
    else:
        print(printable(f"test set of {flags['dataset']}" + (f" under {flags['data_path']}" if images.test_files else "")
                        + f": {count:,} images, {len(names)} classes"
                        + (f"; not what the run was tested on: the {', '.join(others)} differ" if others else "")))
    if images.ignored:
        print(printable(f"ignored: {images.ignored}"))
    for reason in images.left_out.values():
        print(printable(f"left out: {reason}"))
    if not without_classes:
        print(report(images.test_labels, predicted, names))
    if args.predictions:
        write_predictions(args.predictions, images, predicted, probabilities)
        print(printable(f"{args.predictions}: {len(predicted):,} predictions"))
    return 0


def find_images(args, flags, saved):
    """Returns the images to predict of a photo or a folder without classes, or None for a data set: --data-path names it, and
    nothing of the data set of the checkpoint lies in there, but images do."""
    root = Path(flags["data_path"])
    if "args" not in saved or not args.data_path or root.is_dir() and is_under(flags["dataset"], root):
        return None
    if not root.is_dir() and not root.is_file():
        raise UsageError(f"argument --data-path: {root} is neither a folder nor a file: give a folder of images, or one image")
    images = load_without_classes(flags["dataset"], root, saved["image_size"], flags["num_workers"], flags["skip_corrupt"],
                                  saved["class_names"], saved["mean"], saved["std"])
    if args.predictions and not images:
        raise UsageError(f"argument --data-path: {root} holds no image of a type that is read: give another")
    if images and not args.predictions:
        raise UsageError(f"argument --data-path: {root} holds images without classes, so there is no accuracy to measure: add "
                         "--predictions FILE.csv")
    return images


def evaluation_flags(args, sums, saved, path):
    """Returns name -> value, of the flags of an evaluation: that of the command line, else the checkpoint, else the default."""
    then = saved.get("args", {})
    if then:
        check_arch(then["arch"], saved["files"], path, [args.arch] if args.arch else [], {args.arch: sums.get("arch")})
    flags = {"num_workers": args.num_workers}
    for name in with_role(FROM_CHECKPOINT):
        given = getattr(args, name)
        if name in ("dataset", "image_size") and then and given not in (None, then.get(name)):
            raise UsageError(f"argument {option(name)}: {given}, but {path} was trained with {then.get(name)}: leave it out")
        flags[name] = next((value for value in (given, then.get(name)) if value is not None), defaults()[name])
    if args.data_path and flags["num_test"] and (args.data_path / DATASETS[flags["dataset"]].folders[1]).is_dir():
        flags["num_test"] = 0           # this folder has test images of its own
    return flags


def report(labels, predicted, names):
    """Returns lines about predictions: error, report of each class and confusion matrix, of scikit-learn.

    labels, predicted: (N,) class indices.  names: of the K classes.
    """
    try:
        from sklearn.metrics import classification_report, confusion_matrix  # takes a second to load
    except ImportError:
        classification_report = None
    right = int((predicted == labels).sum())
    lines = [f"accuracy {100 * right / len(labels):.2f} %, error {100 * (1 - right / len(labels)):.2f} % ({right:,} of "
             f"{len(labels):,} are right)"]
    if classification_report is None:
        return "\n".join([*lines, "the report of each class needs scikit-learn: pip install scikit-learn"])
    every = range(len(names))
    lines += ["", classification_report(labels, predicted, labels=every, target_names=names, digits=4, zero_division=0)]
    if len(names) > MOST_CLASSES:
        return "\n".join(lines)
    matrix = confusion_matrix(labels, predicted, labels=every)
    width, cell = max(map(len, names)), max(3, len(str(matrix.max())))
    lines += ["confusion matrix: a row for each true class, a column for each predicted one, in the same order",
              *(f"{name:{width}}  " + "  ".join(f"{count:{cell}}" for count in row)
                for name, row in zip(names, matrix.tolist()))]
    return "\n".join(lines)


def write_predictions(path, images, predicted, probabilities):
    """Writes a CSV file with a row for each test image: file, predicted class and name, confidence, the true class and name
    where they are known, and the probability of each class.

    A text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    def cell(value):
        if isinstance(value, float):
            return f"{value:.9g}"
        return f"'{value}" if str(value).startswith(("=", "+", "-", "@", "\t", "\r")) else value

    names, known = images.class_names, bool((images.test_labels >= 0).all())
    rows = [["file", "predicted", "predicted_name", "confidence", *(["label", "label_name"] if known else []), *names]]
    files = images.test_files or range(len(predicted))          # a data set without files: the number of the image
    for file, guess, label, p in zip(files, predicted.tolist(), images.test_labels.tolist(), probabilities.tolist()):
        rows.append([file, guess, names[guess], p[guess], *([label, names[label]] if known else []), *p])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(cell, row) for row in rows)
    with replacing(path) as out:
        out.write(text.getvalue().encode(errors="surrogateescape"))
