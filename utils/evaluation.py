"""`train_meta.py --evaluate`: measures a trained network on the test set, and trains nothing."""
import csv
import io

from utils import checkpoint
from utils.checkpoint import CheckpointError
from utils.cli import UsageError, training_parser
from utils.device import choose_device, memory_for_images, set_precision
from utils.files import replacing
from utils.metrics import all_finite, confusion_matrix, expected_calibration_error, predict
from utils.run_folder import differing, trained_on

MOST_CLASSES = 20       # whose confusion matrix is printed whole


def evaluate_file(args, sha256, datasets, models):
    """Prints what the checkpoint or state dict args.evaluate achieves; writes args.predictions, if given.  Returns 0.

    sha256: of the file of args.arch, if that is one of the user's own.  datasets, models: the two packages.
    Raises UsageError, DataError or NetworkError for what does not fit together.
    """
    path = args.evaluate
    device = choose_device(args.device)
    state = checkpoint.load_to_evaluate(path)
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
    images = datasets.load_dataset(flags["dataset"], flags["data_path"], flags["image_size"],
                                   num_workers=args.num_workers, memory=memory_for_images(device),
                                   statistics=(state["mean"], state["std"]) if "mean" in state else None)
    if saved and list(images.class_names) != state["class_names"]:
        raise datasets.DataError(f"argument --data-path: {flags['data_path']} has other classes than {path} was trained on")
    others = [name for name in differing(images.digest, trained_on(state)) if "test" in name] if saved else []
    if others and not args.data_path:
        raise UsageError(f"argument --data-path: {flags['data_path']} is not what {path} was tested on: the "
                         f"{', '.join(others)} differ: give a folder to measure what is in there")
    models.rehearse(flags["arch"], images.num_classes, images.test_images.shape[-1], device, dtype)
    model = models.build_model(flags["arch"], images.num_classes, device)
    checkpoint.load_weights({"model": state["model"], "args": flags}, model, f"argument --evaluate: {path}")
    if not all_finite(model.state_dict().values()):
        raise CheckpointError(f"argument --evaluate: the weights in {path} are not finite")
    mean, std = state.get("mean", images.mean), state.get("std", images.std)
    predicted, confidence = predict(model, datasets.normalized_batches(images.test_images, images.test_labels, mean, std,
                                                                       device), dtype)

    names = [name.encode(errors="replace").decode() for name in images.class_names]
    step = f" of step {state['step']}" if saved else ", a state dict"
    print(f"{path}{step}: {flags['arch']} on {device.type}, {flags['precision']}")
    print(f"test set of {flags['dataset']}" + (f" under {flags['data_path']}" if images.test_files else "")
          + f": {len(predicted):,} images, {len(names)} classes"
          + (f"; not what the run was tested on: the {', '.join(others)} differ" if others else ""))
    print("\n".join(report(images.test_labels, predicted, confidence, names)))
    if args.predictions:
        write_predictions(args.predictions, images, predicted, confidence)
        print(f"{args.predictions}: {len(predicted):,} predictions")
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
        yield f"{name:{width}}  {row.sum():6}  {100 * hits / row.sum():6.2f} %"
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


def write_predictions(path, images, predicted, confidence):
    """A row for each test image: index, file (of a folder), label, predicted, confidence in [0, 1], and the two names."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["index", "file", "label", "predicted", "confidence", "label_name", "predicted_name"])
    for i, (label, guess, sure) in enumerate(zip(images.test_labels.tolist(), predicted.tolist(), confidence.tolist())):
        file = images.test_files[i] if images.test_files else ""
        table.writerow([i, file, label, guess, f"{sure:.9g}", images.class_names[label], images.class_names[guess]])
    with replacing(path) as out:
        out.write(text.getvalue().encode(errors="surrogateescape"))
