"""Figure 3 of the paper: the features of trained networks, how well they separate the classes, and their embedding in 2D."""
import sys
from importlib.metadata import version

import numpy as np
import torch
from openTSNE import TSNE
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

from datasets import data_digest, normalized_batches
from models import is_custom
from reproduction.figures import data_name, draw_features
from utils import checkpoint
from utils.device import choose_device
from utils.errors import UsageError, printable
from utils.experiment import check_arch
from utils.files import INDICES, read_split, replacing, write_json
from utils.meters import all_finite
from utils.setup import check_same_data, load_images, load_model
from utils.trial import network_failures

MOST_POINTS = 5000          # unlabeled and test points that are drawn by default, as in the paper
NEIGHBORS = 5


def plot(args):
    """Draws the figure of some checkpoints, and returns the paths; nothing is written before all of it has been computed."""
    device = choose_device(args.device)
    checkpoints = [checkpoint.load(path) for path in args.checkpoint_path]
    for path, saved in zip(args.checkpoint_path, checkpoints):
        check_arch(saved["args"]["arch"], saved["files"], path, args.arch)
        if args.dataset not in (None, saved["args"]["dataset"]):
            raise UsageError(f"argument --dataset: {args.dataset}, but {path} was trained on {saved['args']['dataset']}: "
                              "leave the flag out")
    flags = {**checkpoints[0]["args"], "num_workers": args.num_workers}
    flags["data_path"] = args.data_path or flags["data_path"]
    images = load_images(flags, device, checkpoints[0], download=bool(args.data_path))
    if images.ignored:
        print(f"ignored: {images.ignored}")
    if count := len(images.train_labels) - images.num_train:
        print(f"{count:,} images have no class: the figure and its measures leave them out")
    data = data_digest(images)
    labels = args.row_label or [path.resolve().parent.name for path in args.checkpoint_path]
    index_paths = args.index_path or [path.with_name(INDICES) for path in args.checkpoint_path]
    rows = []
    for path, saved, label, index_path in zip(args.checkpoint_path, checkpoints, labels, index_paths):
        check_same_data(data, saved, path, flags["data_path"])
        if (args.index_path or index_path.exists()) and sorted(read_split(index_path)) != sorted(saved["labeled"].tolist()):
            raise UsageError(f"argument --index-path: {index_path} is not the split that the checkpoint was trained on: give "
                             "the label_indices.txt of its run folder")
        rows.append({"label": printable(label), "checkpoint": str(path), "step": saved["step"], "arch": saved["args"]["arch"],
                     **choose_points(args, saved, images)})
    for row, saved in zip(rows, checkpoints):
        features, row["predictions"] = features_of(saved, images, row, device)
        row["knn_accuracy"] = measure(features, row["part"], row["classes"])
        for part, accuracy in row["knn_accuracy"].items():
            print(f"{row['label']}, {part}: {NEIGHBORS}-nearest-neighbor accuracy {100 * accuracy:.2f} %", flush=True)
        row["coordinates"], row["kl_divergence"], software = embed(features, args)

    method = "PCA" if args.method == "pca" else "t-SNE"
    title = f"{method} of the features, {data_name(flags)}, {len(rows[0]['sample']):,} points"
    paths = draw_features(rows, images.class_names, args.save_path, title, args.mark_errors)
    return [*paths, *write_embedding(args, flags["dataset"], images.class_names, rows, software)]


def write_embedding(args, dataset, class_names, rows, software):
    """Writes embedding.npz and embedding.json, what the figure shows and how it was made; returns the paths."""
    arrays, summary = args.save_path / "embedding.npz", args.save_path / "embedding.json"
    with replacing(arrays) as file:
        np.savez(file, labels=[row["label"] for row in rows], **{
            f"{key}_{i}": row[key] for i, row in enumerate(rows)
            for key in ("coordinates", "part", "sample", "classes", "predictions", "drawn")})
    write_json(summary, {
        "method": args.method, "software": software, "seed": args.seed,
        "perplexity": args.perplexity if args.method == "tsne" else None,
        "embedded": "all" if args.embed_all else "sample", "dataset": dataset, "neighbors": NEIGHBORS,
        "class_names": list(class_names),
        "rows": [{key: row[key] for key in ("label", "checkpoint", "step", "arch", "knn_accuracy", "kl_divergence")}
                 for row in rows]})
    return [arrays, summary]


def choose_points(args, saved, images):
    """Returns what is embedded, and which of it is drawn: arrays "part", "sample" (index in its set), "classes" and "drawn".

    Raises UsageError for points that cannot be embedded or measured.
    """
    rng, points = np.random.default_rng(args.seed), []
    labeled = saved["labeled"].numpy()
    unlabeled = np.setdiff1d(np.arange(images.num_train), np.concatenate([labeled, saved["validation"].numpy()]))
    for part, available, classes in (("labeled", labeled, images.train_labels), ("unlabeled", unlabeled, images.train_labels),
                                     ("test", np.arange(len(images.test_labels)), images.test_labels)):
        most = len(available) if part == "labeled" else args.num_point or MOST_POINTS
        if args.num_point and most > len(available):
            print(f"all {len(available):,} {part} images are drawn: there are fewer than --num-point {most}")
        drawn = np.isin(np.arange(len(available)), rng.permutation(len(available))[:most])
        embedded = drawn | args.embed_all
        sample = available[embedded]
        points.append((np.full(len(sample), part), sample, classes.numpy()[sample], drawn[embedded]))
    points = dict(zip(("part", "sample", "classes", "drawn"), map(np.concatenate, zip(*points))))
    if len(labeled) < 2:
        raise UsageError("argument --checkpoint-path: a run with one labeled image: the figure and its measures need two")
    count = len(points["part"])
    if args.method == "tsne" and 3 * args.perplexity > count - 1:
        raise UsageError(f"argument --perplexity: {args.perplexity:g} is too large for {count} points: use at most "
                         f"{(count - 1) // 3}")
    return points


def features_of(saved, images, row, device):
    """Returns features (N, D) float32 and predicted classes (N,) of the points of a row, by the network of its checkpoint."""
    arch, name = row["arch"], f"argument --checkpoint-path: {row['checkpoint']}"
    model = load_model(arch, images.num_classes, device, saved["model"], name)
    model.eval()
    if not callable(getattr(model, "features", None)):
        raise UsageError(f"argument --arch: {arch} has no features(x): add it, and let it return (B, D), what the figure "
                         "is to show")
    test = row["part"] == "test"                # they come last
    features, logits = [], []
    with torch.no_grad(), network_failures(arch):
        for pixels, own in ((images.train_images, ~test), (images.test_images, test)):
            for x, _ in normalized_batches(pixels[row["sample"][own]], torch.from_numpy(row["classes"][own]), saved["mean"],
                                           saved["std"], device, 500):
                found = model.features(x)
                shape = tuple(getattr(found, "shape", ()))
                if len(shape) != 2 or shape[0] != len(x) or shape[1] < 2:
                    raise UsageError(f"argument --arch: features(x) of {arch} gives a {type(found).__name__} of shape {shape} "
                                     f"for {len(x)} images: expected a tensor (B, D), D at least 2")
                features.append(found)
                logits.append(model(x) if is_custom(arch) else model.classifier(found))
    features, logits = torch.cat(features).float(), torch.cat(logits)
    if not all_finite([features, logits]):
        raise UsageError(f"{name}: its features or logits are not finite")
    features = features.cpu().numpy()
    spread = np.ptp(features, axis=0).max()
    if not 1e-12 < spread < 1e12:               # beyond that the embedding leaves the numbers
        raise UsageError(f"{name}: its features differ by {spread:g}: nothing can be shown unless that is between 1e-12 and "
                         "1e12")
    return features, logits.argmax(dim=1).cpu().numpy()


def measure(features, part, classes):
    """Returns how well the features separate the classes: part -> accuracy of a vote of the nearest labeled features.

    An image has no vote on itself.
    """
    labeled = part == "labeled"
    vote = KNeighborsClassifier(min(NEIGHBORS, labeled.sum() - 1)).fit(features[labeled], classes[labeled])
    accuracy = {}
    for name in dict.fromkeys(part.tolist()):           # in this order; with all labels nothing is unlabeled
        votes = vote.predict(None if name == "labeled" else features[part == name])
        accuracy[name] = float((votes == classes[part == name]).mean())
    return accuracy


def embed(features, args):
    """Returns coordinates (N, 2), the final KL divergence of t-SNE (else None), and the software that made them.

    The same seed gives the same coordinates whatever the number of threads: what would sum in another order runs on one.
    """
    with threadpool_limits(1, user_api="blas"):
        if args.method == "pca":
            coordinates = PCA(2, svd_solver="full").fit_transform(features)
            return coordinates, None, f"scikit-learn {version('scikit-learn')}"
        embedding = TSNE(perplexity=args.perplexity, random_state=args.seed, n_jobs=torch.get_num_threads(),
                         verbose=sys.stderr.isatty()).fit(features)
        return np.asarray(embedding), float(embedding.kl_divergence), f"openTSNE {version('openTSNE')}"
