"""`train_meta.py --evaluate`: measures a trained network on the test set, and trains nothing."""
import csv
import io

import torch

from datasets.splits import check_split
from utils import checkpoint
from utils.checkpoint import CheckpointError
from utils.cli import UsageError, training_parser
from utils.device import choose_device, memory_for_images, set_precision, slow_precision
from utils.failure import own_network
from utils.files import printable, replacing
from utils.metrics import Diverged, all_finite, confusion_matrix, expected_calibration_error, finite_names, predict
from utils.run_folder import differing, trained_on

MOST_CLASSES = 20       # whose confusion matrix is printed whole


def evaluate_file(args, sha256, datasets, models):
    """Prints what the checkpoint or state dict args.evaluate achieves; writes args.predictions, if given.  Returns 0.

    sha256: of the file of args.arch, if that is one of the user's own.  datasets, models: the two packages.
    Raises UsageError, DataError or NetworkError for what does not fit together.
    """
    path = args.evaluate
    device = choose_device(args.device)
    state = checkpoint.load(path, bare=True)
    saved = state.get("args", {})
    if saved:
        checkpoint.check_arch(saved, path, {args.arch: sha256} if args.arch else {})
    defaults, flags = training_parser(datasets.DATASETS, models.NETWORKS), {}
    for key in ("dataset", "data_path", "arch", "image_size", "precision"):
        given, then = getattr(args, key), saved.get(key)
        if key in ("dataset", "image_size") and saved and given not in (None, then):
            raise UsageError(f"argument --{key.replace('_', '-')}: {given}, but {path} was trained with {then}: leave it out")
        flags[key] = given or then or defaults.get_default(key)
    if flags["dataset"] not in datasets.DATASETS:
        raise CheckpointError(f"argument --evaluate: {path} speaks of an unknown data set {flags['dataset']!r}")

    dtype = set_precision(flags["precision"], device)
    if slow := slow_precision(flags["precision"], device):
        print(slow)
    images = datasets.load_dataset(flags["dataset"], flags["data_path"], flags["image_size"],
                                   num_workers=args.num_workers, memory=memory_for_images(device),
                                   skip_corrupt=args.skip_corrupt or saved.get("skip_corrupt", False),
                                   statistics=(state["mean"], state["std"]) if "mean" in state else None,
                                   download=bool(args.data_path) or not saved)
    if saved:
        check_split(state["labeled"], state["validation"], len(images.train_labels), path)
    if saved and list(images.class_names) != state["class_names"]:
        raise datasets.DataError(f"argument --data-path: {flags['data_path']} has other classes than {path} was trained on")
    others = [name for name in differing(images.digest, trained_on(state)) if "test" in name] if saved else []
    if others and not args.data_path:
        raise UsageError(f"argument --data-path: {flags['data_path']} is not what {path} was tested on: the "
                         f"{', '.join(others)} differ: give a folder to measure what is in there")
    warned = models.rehearse(flags["arch"], images.num_classes, images.image_size, device, dtype)
    model = models.build_model(flags["arch"], images.num_classes, device)
    always_finite = finite_names(model)
    checkpoint.load_weights({"model": state["model"], "args": flags}, model, f"argument --evaluate: {path}")
    if not all_finite(value for name, value in model.state_dict().items() if name in always_finite):
        raise CheckpointError(f"argument --evaluate: the weights in {path} are not finite")
    mean, std = state.get("mean", images.mean), state.get("std", images.std)
    count = len(images.test_labels)
    batches = datasets.normalized_batches(images.test_images, torch.arange(count), mean, std, device)
    try:
        with own_network(flags["arch"]):
            predicted, confidence, index = predict(model, batches, dtype)
    except Diverged as error:
        raise CheckpointError(f"argument --evaluate: {path}: {error}") from None

    names = [printable(name) for name in images.class_names]
    step = f" of step {state['step']}" if saved else ", a state dict"
    print("\n".join([*warned, printable(f"{path}{step}: {flags['arch']} on {device.type}, {flags['precision']}")]))
    print(printable(f"test set of {flags['dataset']}" + (f" under {flags['data_path']}" if images.test_files else "")
                    + f": {count:,} images, {len(names)} classes"
                    + (f"; not what the run was tested on: the {', '.join(others)} differ" if others else "")))
    if images.ignored:
        print(printable(f"ignored: {images.ignored}"))
    if len(index) < count:
        print("\n".join(map(printable, images.skipped())))
        print(f"the following is over {len(index):,} of {count:,} images: the others cannot be read")
    print("\n".join(report(images.test_labels[index], predicted, confidence, names)))
    if args.predictions:
        write_predictions(args.predictions, images, index, predicted, confidence)
        print(printable(f"{args.predictions}: {len(predicted):,} predictions"))
    return 0


def report(labels, predicted, confidence, names):
    """The lines that `evaluate_file` prints; labels, predicted (N,) class indices, confidence (N,), names of the K classes."""
    correct = predicted == labels
    matrix = confusion_matrix(labels, predicted, len(names))
    right, share = int(correct.sum()), correct.double().mean().item()
    width = max(10, *map(len, names))
    yield f"accuracy {100 * share:.2f} %, error {100 * (1 - share):.2f} % ({right:,} of {len(labels):,} are right)"
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


def write_predictions(path, images, index, predicted, confidence):
    """A row for each test image, index (N,): index, file (of a folder), label, predicted, confidence in [0, 1], both names.

    A name that a spreadsheet would take for a formula has an apostrophe before it.
    """
    def cell(name):
        return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name

    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["index", "file", "label", "predicted", "confidence", "label_name", "predicted_name"])
    columns = index, images.test_labels[index], predicted, confidence
    for i, label, guess, sure in zip(*(column.tolist() for column in columns)):
        names = images.test_files[i] if images.test_files else "", images.class_names[label], images.class_names[guess]
        file, label_name, predicted_name = map(cell, names)
        table.writerow([i, file, label, guess, f"{sure:.9g}", label_name, predicted_name])
    with replacing(path) as out:
        out.write(text.getvalue().encode(errors="surrogateescape"))
