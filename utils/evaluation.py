"""How well a network does: in the course of a run, and of a finished one for `train_meta.py --evaluate`."""
import csv
import io
from pathlib import Path

import torch

from datasets import DATASETS, DataError, normalized_batches
from datasets.loading import load_without_classes
from datasets.table import is_under
from models import dry_run
from utils import checkpoint, metrics
from utils.cli import UsageError, option
from utils.device import choose_device, set_precision, slow_precision
from utils.failure import Diverged, network_failures
from utils.files import printable, replacing
from utils.flags import FROM_CHECKPOINT, declared, with_role
from utils.metrics import expected_calibration_error, predict
from utils.records import differing
from utils.state import CheckpointError, data_of, load_data, load_model

MOST_CLASSES = 20       # whose confusion matrix is printed whole


class Evaluator:
    """Measures a run in its course, on the test images and, with --num-val, on the validation images.

    Each process of a world measures a shard of every set, and all get the same answers.
    """

    def __init__(self, state, images, device, dtype, world):
        """images: as `load_dataset` returns them."""
        self.state, self.images, self.device, self.dtype, self.world = state, images, device, dtype, world
        self.fault = None               # why this process cannot read some images, if it cannot
        self.counts = {"test": len(images.test_labels), "validation": len(state.validation)}
        self.sets = {"test": (world.shard(images.test_images), world.shard(images.test_labels))}
        if len(state.validation):
            self.sets["validation"] = self.training_images(state.validation)

    def training_images(self, indices):
        """This process's shard of some training images, and their labels."""
        index = self.world.shard(indices.numpy())
        return self.images.train_images[index], self.images.train_labels[index]

    def measure(self, x, y, stop):
        """`metrics.evaluate` of one set; an error of the network or its logits names the step.

        None as well if images cannot be read, in all processes; `raise_fault` says which.
        """
        batches = normalized_batches(x, y, self.images.mean, self.images.std, self.device)
        try:
            with network_failures(self.state.args["arch"], self.state.step):
                return metrics.evaluate(self.state.model, batches, self.dtype, stop, self.world.all_reduce_numbers)
        except Diverged as error:
            raise Diverged(f"{error} at step {self.state.step}") from None
        except (DataError, OSError) as error:
            self.fault = error
            return None

    def raise_fault(self):
        """Raises OSError in every process if one of them cannot read its images."""
        faults = [error for error in self.world.all_gather_object(self.fault and str(self.fault)) if error]
        if faults:
            raise OSError(f"{faults[0]}; step {self.state.step} is saved, and --resume continues from there")

    def evaluate(self, stop):
        """Accuracies in [0, 1] by tag, such as "test/accuracy" and "test/top5"; None as in `measure`.

        "test/images" is how many images there were, where some cannot be read.
        """
        scalars = {}
        for name, (x, y) in self.sets.items():
            measured = self.measure(x, y, stop)
            if measured is None:
                return None
            if measured["images"] == self.counts[name]:
                del measured["images"]
            scalars |= {f"{name}/{key}": value for key, value in measured.items()}
        return scalars

    def measure_labeled(self, stop):
        """As `measure`, of the labeled images, without augmentation."""
        return self.measure(*self.training_images(self.state.labeled), stop)

    def describe(self, scalars):
        """What `evaluate` returned, in words."""
        parts = [f"{tag.replace('/accuracy', '').replace('/top5', ' top-5')} error {100 * (1 - value):.2f} %"
                 for tag, value in scalars.items() if not tag.endswith("/images")]
        parts += [f"over {scalars[f'{name}/images']:,} of {count:,} {name} images: the others cannot be read"
                  for name, count in self.counts.items() if f"{name}/images" in scalars]
        return "  ".join(parts)

    def skipped(self):
        """Lines about images that a process skipped since the last call."""
        if not self.state.args["skip_corrupt"]:
            return []
        return [line for lines in self.world.all_gather_object(self.images.skipped()) for line in lines]


def evaluate_file(args):
    """Prints what the checkpoint or state dict args.evaluate achieves; writes args.predictions, if given.  Returns 0."""
    path, source = args.evaluate, f"argument --evaluate: {args.evaluate}"
    device = choose_device(args.device)
    saved = checkpoint.load(path, bare=True)
    flags = evaluation_flags(args, saved)
    trained = "args" in saved           # not of a bare state dict
    dtype = set_precision(flags["precision"], device)
    if slow := slow_precision(flags["precision"], device):
        print(slow)
    without_classes = find_images(args, flags, saved)
    images = without_classes or load_data(flags, device, saved, path, download=bool(args.data_path) or not trained)
    others = []                         # names of what is not as in the run
    if trained and not without_classes:
        if list(images.class_names) != saved["class_names"]:
            raise DataError(f"argument --data-path: {flags['data_path']} has other classes than {path} was trained on")
        others = [name for name in differing(images.digest, data_of(saved)) if "test" in name]
    if others and not args.data_path:
        raise UsageError(f"argument --data-path: {flags['data_path']} is not what {path} was tested on: the "
                         f"{', '.join(others)} differ: give a folder to measure what is in there")
    warned = dry_run(flags["arch"], images.num_classes, images.image_size, device, dtype)
    model = load_model(flags["arch"], images, device, saved, source)
    count = len(images.test_labels)
    batches = normalized_batches(images.test_images, torch.arange(count), images.mean, images.std, device)
    try:
        with network_failures(flags["arch"]):
            predicted, probabilities, index = predict(model, batches, dtype)
    except Diverged as error:
        raise CheckpointError(f"{source}: {error}") from None

    names = [printable(name) for name in images.class_names]
    step = f" of step {saved['step']}" if trained else ", a state dict"
    print("\n".join([*warned, printable(f"{path}{step}: {flags['arch']} on {device.type}, {flags['precision']}")]))
    confidence = probabilities.gather(1, predicted[:, None])[:, 0]
    if without_classes:
        data = f"{flags['data_path']}: {count:,} images without a class, of which no accuracy can be told"
        lines, rows = [], rows_without_classes(images, index, predicted, probabilities)
    else:
        data = (f"test set of {flags['dataset']}" + (f" under {flags['data_path']}" if images.test_files else "")
                + f": {count:,} images, {len(names)} classes"
                + (f"; not what the run was tested on: the {', '.join(others)} differ" if others else ""))
        lines = report(images.test_labels[index], predicted, confidence, names)
        rows = rows_with_classes(images, index, predicted, confidence)
    print(printable(data))
    if images.ignored:
        print(printable(f"ignored: {images.ignored}"))
    if len(index) < count:
        print("\n".join(map(printable, images.skipped())))
        print(f"the following is over {len(index):,} of {count:,} images: the others cannot be read")
    for line in lines:
        print(line)
    if args.predictions:
        write_predictions(args.predictions, rows)
        print(printable(f"{args.predictions}: {len(predicted):,} predictions"))
    return 0


def find_images(args, flags, saved):
    """The images to predict of a folder without classes, or None for a data set: --data-path names a folder, --predictions is
    given, and nothing of the data set of the checkpoint lies in there, but images do."""
    root = Path(flags["data_path"])
    if not ("args" in saved and args.predictions and args.data_path and root.is_dir()) or is_under(flags["dataset"], root):
        return None
    return load_without_classes(flags["dataset"], root, saved["image_size"], flags["num_workers"], flags["skip_corrupt"],
                                saved["class_names"], saved["mean"], saved["std"])


def evaluation_flags(args, saved):
    """name -> value, of the flags of an evaluation: what the command line says, else the checkpoint, else the default."""
    path, then = args.evaluate, saved.get("args", {})
    if then:
        checkpoint.check_arch(then, path, {args.arch: getattr(args, "arch_sha256", None)} if args.arch else {})
    flags = {"num_workers": args.num_workers, "skip_corrupt": args.skip_corrupt or then.get("skip_corrupt", False)}
    for name in with_role(FROM_CHECKPOINT):
        given = getattr(args, name)
        if name in ("dataset", "image_size") and then and given not in (None, then.get(name)):
            raise UsageError(f"argument {option(name)}: {given}, but {path} was trained with {then.get(name)}: leave it out")
        flags[name] = given or then.get(name) or declared()[name].default
    if flags["dataset"] not in DATASETS:
        raise CheckpointError(f"argument --evaluate: {path} speaks of an unknown data set {flags['dataset']!r}")
    return flags


def report(labels, predicted, confidence, names):
    """The lines that `evaluate_file` prints; labels, predicted (N,) class indices, confidence (N,), names of the K classes."""
    from sklearn.metrics import confusion_matrix  # takes a second to load

    correct = predicted == labels
    matrix = torch.from_numpy(confusion_matrix(labels, predicted, labels=range(len(names))))
    right, accuracy = int(correct.sum()), correct.double().mean().item()
    width = max(10, *map(len, names))
    yield f"accuracy {100 * accuracy:.2f} %, error {100 * (1 - accuracy):.2f} % ({right:,} of {len(labels):,} are right)"
    yield f"expected calibration error {expected_calibration_error(confidence, correct):.4f} (15 bins)"
    yield f"\n{'class':{width}}  images  accuracy"
    for name, row, hits in zip(names, matrix, matrix.diagonal()):
        yield f"{name:{width}}  {row.sum():6}  " + (f"{100 * hits / row.sum():6.2f} %" if row.sum() else "     -")
    if len(names) <= MOST_CLASSES:
        cell = max(3, len(str(matrix.max().item())), len(str(len(names) - 1)))
        yield "\nconfusion matrix: a row for each true class, a column for each predicted one, in the same order"
        for name, row in zip(names, matrix.tolist()):
            yield f"{name:{width}}  " + "  ".join(f"{count:{cell}}" for count in row)
    else:
        wrong = matrix.fill_diagonal_(0).flatten()
        yield f"\nthe {MOST_CLASSES} most frequent confusions"
        for i in wrong.argsort(descending=True, stable=True)[:MOST_CLASSES].tolist():
            if wrong[i]:
                yield f"{wrong[i]:6}  {names[i // len(names)]} taken for {names[i % len(names)]}"


def rows_with_classes(images, index, predicted, confidence):
    """A row for each test image, index (N,): index, file (of a folder), label, predicted, confidence in [0, 1], both names."""
    yield ["index", "file", "label", "predicted", "confidence", "label_name", "predicted_name"]
    columns = index, images.test_labels[index], predicted, confidence
    for i, label, guess, sure in zip(*(column.tolist() for column in columns)):
        file = images.test_files[i] if images.test_files else ""
        yield [i, file, label, guess, sure, images.class_names[label], images.class_names[guess]]


def rows_without_classes(images, index, predicted, probabilities):
    """A row for each image, index (N,): file, predicted, its name, and the probability in [0, 1] of each class."""
    yield ["file", "predicted", "predicted_name", *images.class_names]
    for i, guess, row in zip(index.tolist(), predicted.tolist(), probabilities):
        yield [images.test_files[i], guess, images.class_names[guess], *row.tolist()]


def write_predictions(path, rows):
    """A CSV file of rows of texts and numbers.  A text that a spreadsheet would take for a formula has an apostrophe before
    it."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:.9g}"
        return f"'{value}" if str(value).startswith(("=", "+", "-", "@", "\t", "\r")) else value

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerows(map(cell, row) for row in rows)
    with replacing(path) as out:
        out.write(text.getvalue().encode(errors="surrogateescape"))
