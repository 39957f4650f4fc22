"""The figures: Figure 3 of the paper from embedded features, and the curves of runs from their metrics.jsonl."""
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # unlike pyplot's, it needs no display and no closing
from matplotlib.lines import Line2D

from reproduction.cells import ROWS, published_error, row_of
from utils.cli import UsageError
from utils.files import printable, replacing
from utils.records import read_flags, read_metrics, read_split_sums

COLORS = matplotlib.color_sequences["petroff10"]        # made to be told apart by color-blind readers
LOOKS = [(color, marker) for marker in "o^s" for color in COLORS]       # of classes
PLAIN = {"text.parse_math": False}      # a name may hold any number of $
SUBSET_COLORS = {"labeled": "#d62728", "unlabeled": "#1f77b4", "test": "#999999"}      # red, blue, gray: the paper's


def data_name(flags):
    """What a figure calls the data of a run; a folder of images goes by its own name."""
    return printable(Path(flags["data_path"]).name if flags["dataset"] == "folder" else flags["dataset"])


@matplotlib.rc_context(PLAIN)
def draw_features(rows, class_names, folder, title, mark_errors=False):
    """Writes features.png and features.pdf, with four panels for each of `rows`; returns their paths.

    rows: dicts with "label", "knn_accuracy", and arrays: "coordinates" (N, 2); "part" (N,), names of SUBSET_COLORS; "classes"
    and "predictions" (N,), class indices; "drawn" (N,) bool.
    """
    fig = Figure(figsize=(12, 2.95 * len(rows) + 0.95), layout="constrained")
    axes = fig.subplots(len(rows), 4, squeeze=False)
    for row, panels in zip(rows, axes):
        xy, subset, classes, predictions = (row[key][row["drawn"]] for key in ("coordinates", "part", "classes", "predictions"))
        size = float(np.clip(12000 / len(xy), 1.5, 16))
        few_labeled = (subset == "labeled").sum() < 500
        sizes = {"labeled": 2 * size if few_labeled else size, "unlabeled": size, "test": size}
        for ax, name in zip(panels, SUBSET_COLORS):
            for k in range(len(class_names)):
                dots(ax, xy[(subset == name) & (classes == k)], sizes[name], *style(k, len(class_names)))
            if mark_errors and name == "test":
                wrong = (subset == name) & (predictions != classes)
                ax.scatter(*xy[wrong].T, s=3 * size, color="black", marker="x", linewidths=0.6, rasterized=True)
        order = np.random.default_rng(0).permutation(len(xy))      # so that no set hides another
        if few_labeled:
            order = order[np.argsort(subset[order] == "labeled", kind="stable")]
        dots(panels[3], xy[order], [sizes[s] for s in subset[order]], [SUBSET_COLORS[s] for s in subset[order]], "o")
        center, half = (xy.max(axis=0) + xy.min(axis=0)) / 2, 0.53 * (xy.max(axis=0) - xy.min(axis=0)).max()
        for ax in panels:
            ax.set(xlim=(center[0] - half, center[0] + half), ylim=(center[1] - half, center[1] + half), xticks=[], yticks=[],
                   aspect="equal")
        panels[0].set_ylabel(f"{row['label']}\ntest kNN {100 * row['knn_accuracy']['test']:.1f} %", fontsize=11)
    for ax, name in zip(axes[0], ("Labeled", "Unlabeled", "Test", "All")):
        ax.set_title(name, fontsize=12)
    handles = []
    if len(class_names) <= len(LOOKS):
        handles = [handle(name, *style(k, len(class_names))) for k, name in enumerate(class_names)]
    if mark_errors:
        handles.append(handle("misclassified", "black", "x"))
    handles += [handle(f"All: {name}", color, "o") for name, color in SUBSET_COLORS.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False, fontsize=10)
    fig.suptitle(title, fontsize=12)
    return save(fig, folder, "features")


def dots(ax, points, size, color, marker):
    ax.scatter(*points.T, s=size, color=color, marker=marker, linewidths=0, rasterized=True)


def handle(label, color, marker):
    return Line2D([], [], linestyle="", color=color, marker=marker, label=printable(label))


def style(k, num_classes):
    """Color and marker of class k; beyond thirty classes a color map, without a legend."""
    return LOOKS[k] if num_classes <= len(LOOKS) else (matplotlib.colormaps["viridis"](k / (num_classes - 1)), "o")


@matplotlib.rc_context(PLAIN)
def draw_curves(folders, save_path):
    """curves.png and curves.pdf: test error and training loss over the steps; returns their paths.

    Runs that differ only in their seed or list of labeled images are one line, the mean, in a band from the least to the
    greatest, as far as the shortest of them goes.  The published error of the same row, if there is one, is a dashed line.

    Raises UsageError for a folder that is not one of a run, and for the same run given twice.
    """
    groups, seen = {}, {}
    for folder in folders:
        try:
            flags, sums, lines = read_flags(folder), read_split_sums(folder), read_metrics(folder)
        except UsageError as error:
            raise UsageError(f"argument --curves: {folder} is not the folder of a run ({error})") from None
        may_differ = ("seed", "split", "data_path", "num_workers")
        key = repr(sorted((name, value) for name, value in flags.items() if name not in may_differ)) + sums["labels_sha256"]
        first = seen.setdefault((key, flags["seed"], sums["sha256"]), folder)
        if first is not folder:
            raise UsageError(f"argument --curves: {first} and {folder} are the same run, seed {flags['seed']} with the same "
                             "labeled images: give each run once")
        groups.setdefault(key, (flags, folder, []))[2].append(lines)

    fig = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    rows = [ROWS[row_of(flags)].title for flags, *_ in groups.values()]
    titles = [f"{row}, {data_name(flags)}, {flags['num_label']} labels, {flags['arch']}"
              for row, (flags, *_) in zip(rows, groups.values())]
    for i, (row, title, (flags, folder, runs)) in enumerate(zip(rows, titles, groups.values())):
        apart = f", {folder}" if titles.count(title) > 1 else ""        # they differ in another flag
        label = printable(f"{title}{apart}, n = {len(runs)}")
        ends = sorted({lines[-1]["step"] for lines in runs if lines})
        if len(ends) > 1:
            label += f", to step {ends[0]} (the longest: {ends[-1]})"
            print(f"{label}: the runs differ in length, and are drawn as far as the shortest")
        color = COLORS[i % len(COLORS)]
        for ax, tag, value in ((left, "test/accuracy", lambda a: 100 * (1 - a)), (right, "train/loss", lambda a: a)):
            courses = [{line["step"]: value(line[tag]) for line in lines if tag in line} for lines in runs]
            steps = sorted(set.intersection(*map(set, courses)))
            if not steps:
                raise UsageError(f"argument --curves: {folder} has no {tag} at a step that all its {len(runs)} seeds share")
            values = np.array([[course[step] for step in steps] for course in courses])
            ax.plot(steps, values.mean(axis=0), color=color, label=label, marker="" if steps[1:] else "o")
            ax.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)
        if (published := published_error(flags)) is not None:
            left.axhline(published, color=color, linestyle="--", linewidth=1, label=f"paper: {row}, {published} %")
    left.set(xlabel="step", ylabel="test error in percent", ylim=(0, None))
    right.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return save(fig, save_path, "curves")


def save(fig, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    with replacing(paths[0]) as file:
        fig.savefig(file, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    with replacing(paths[1]) as file:
        fig.savefig(file, format="pdf", metadata={"CreationDate": None})
    return paths
