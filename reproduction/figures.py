"""The figures: Figure 3 of the paper, the curves of runs from their metrics.jsonl, differences from evaluations.csv."""
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure  # unlike pyplot's, it needs no display and no closing
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath

from reproduction.cells import CELLS, ROWS, published_error, row_of
from reproduction.report import COURSES, courses, differences_of, interval, less
from reproduction.sweep import differing, grouped, label
from utils.errors import UsageError, printable
from utils.files import csv_text, read_metrics, replacing, write_text

COLORS = matplotlib.color_sequences["petroff10"]        # made to be told apart by color-blind readers
LOOKS = [(color, marker) for marker in "o^s" for color in COLORS]       # of up to thirty classes
DOTS = {"linewidths": 0, "rasterized": True}
PLAIN = {"text.parse_math": False}      # a name may hold any number of $
SUBSET_COLORS = {"labeled": "#d62728", "unlabeled": "#1f77b4", "test": "#999999"}      # red, blue, gray: the paper's


def data_name(flags):
    """Returns what a figure calls the data of a run; a folder of images goes by its own name."""
    return printable(Path(flags["data_path"]).name if flags["dataset"] == "folder" else flags["dataset"])


@matplotlib.rc_context(PLAIN)
def draw_features(rows, class_names, folder, title, mark_errors=False):
    """Writes features.png and features.pdf, with four panels for each of `rows`; returns their paths.

    rows: dicts with "label", "knn_accuracy", and arrays: "coordinates" (N, 2); "part" (N,), names of SUBSET_COLORS; "classes"
    and "predictions" (N,), class indices; "drawn" (N,) bool.
    """
    fig = Figure(figsize=(12, 2.95 * len(rows) + 0.35), layout="constrained")
    axes, names = fig.subplots(len(rows), 4, squeeze=False), drawn_names(class_names, "class")
    if names != list(map(printable, class_names)):
        title += "; the names of the numbers are in embedding.json"
    if len(class_names) <= len(LOOKS):
        looks = LOOKS[:len(class_names)]
        handles = [handle(name, *look) for name, look in zip(names, looks)]
    else:
        looks, handles = [(color, "o") for color in matplotlib.colormaps["viridis"](np.linspace(0, 1, len(class_names)))], []
        fig.colorbar(ScalarMappable(Normalize(0, len(class_names) - 1), "viridis"), ax=axes, aspect=40, pad=0.01,
                     label="number of the class in the list of embedding.json")
    for row, panels, text in zip(rows, axes, drawn_names([row["label"] for row in rows], "row")):
        xy, subset, classes, predictions = (row[key][row["drawn"]] for key in ("coordinates", "part", "classes", "predictions"))
        size = float(np.clip(12000 / len(xy), 1.5, 16))
        few_labeled = (subset == "labeled").sum() < 500
        sizes = {"labeled": 2 * size if few_labeled else size, "unlabeled": size, "test": size}
        for ax, name in zip(panels, SUBSET_COLORS):
            for k, (color, marker) in enumerate(looks):
                ax.scatter(*xy[(subset == name) & (classes == k)].T, s=sizes[name], color=color, marker=marker, **DOTS)
            if mark_errors and name == "test":
                wrong = (subset == name) & (predictions != classes)
                ax.scatter(*xy[wrong].T, s=3 * size, color="black", marker="x", linewidths=0.6, rasterized=True)
        order = np.random.default_rng(0).permutation(len(xy))      # so that no set hides another
        if few_labeled:
            order = order[np.argsort(subset[order] == "labeled", kind="stable")]
        panels[3].scatter(*xy[order].T, s=[sizes[s] for s in subset[order]], color=[SUBSET_COLORS[s] for s in subset[order]],
                          **DOTS)
        center, half = (xy.max(axis=0) + xy.min(axis=0)) / 2, 0.53 * (xy.max(axis=0) - xy.min(axis=0)).max()
        for ax in panels:
            ax.set(xlim=(center[0] - half, center[0] + half), ylim=(center[1] - half, center[1] + half), xticks=[], yticks=[],
                   aspect="equal")
        panels[0].set_ylabel(f"{broken(text, 2.6, 11)}\ntest kNN {100 * row['knn_accuracy']['test']:.1f} %", fontsize=11)
    for ax, name in zip(axes[0], ("Labeled", "Unlabeled", "Test", "All")):
        ax.set_title(name, fontsize=12)
    if mark_errors:
        handles.append(handle("misclassified", "black", "x"))
    add_legend(fig, [*handles, *(handle(f"All: {name}", color, "o") for name, color in SUBSET_COLORS.items())])
    fig.suptitle(broken(title, 11.5, 12), fontsize=12)
    return save(fig, folder / "features.png", folder / "features.pdf")


def drawn_names(names, kind, first=0):
    """Returns names as a figure shows them: one that the font cannot draw becomes its number, as in "class 3"."""
    font = get_font(findfont(FontProperties()))
    names = list(map(printable, names))
    return [name if all(map(font.get_char_index, map(ord, name))) else f"{kind} {k}" for k, name in enumerate(names, first)]


def width(text, size):
    """Returns the width in inches of a line of text of a size in points."""
    return TextPath((0, 0), text, size=size).get_extents().width / 72 if text.strip() else 0.0


def broken(text, inches, size):
    """Returns a text in lines of at most so many inches."""
    lines, most = [text], len(text)
    while most > 1 and max(width(line, size) for line in lines) > inches:
        most -= 1
        lines = textwrap.wrap(text, most)
    return "\n".join(lines)


def add_legend(fig, handles, size=10):
    """Puts a legend below the panels, in as many columns as fit beside each other, and makes the figure that much higher."""
    room, extra = fig.get_figwidth() - 0.4, 5 * size / 72           # inches; a line sample and the gaps around an entry
    for handle in handles:
        handle.set_label(broken(handle.get_label(), room - extra, size))
    widest = max(width(line, size) for handle in handles for line in handle.get_label().split("\n"))
    columns = min(len(handles), 7, max(1, int(room // (widest + extra))))
    made = fig.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=size)
    fig.set_figheight(fig.get_figheight() + made.get_window_extent(FigureCanvasAgg(fig).get_renderer()).height / fig.dpi)


def handle(label, color, marker):
    return Line2D([], [], linestyle="", color=color, marker=marker, label=label)


@matplotlib.rc_context(PLAIN)
def draw_curves(folders, save_path, labels=None):
    """Writes curves.png, curves.pdf and curves.csv, test error and training loss over the steps; returns their paths.

    Runs that differ only in their seed or list of labeled images are one line, the mean, in a band from the least to the
    greatest, as far as the shortest of them goes.  The published error of the same row, if there is one, is a dashed line.

    labels: names of the lines, or None for those that say in which flags they differ.
    Raises UsageError for a folder that is not one of a run, for the same run given twice, and for too many or few labels.
    """
    groups = grouped(folders)
    if labels and len(labels) != len(groups):
        raise UsageError(f"argument --row-label: {len(labels)} values for {len(groups)} lines: give one for each, in the order "
                         "of their first run")
    fig = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    texts, rows = labels or curve_labels([group[0][0] for group in groups]), []
    for i, (group, name) in enumerate(zip(groups, drawn_names(texts, "line", 1))):
        flags, folder = group[0]
        runs, color = [read_metrics(folder) for _, folder in group], COLORS[i % len(COLORS)]
        name += f", n = {len(runs)}"
        ends = sorted({lines[-1]["step"] for lines in runs if lines})
        if len(ends) > 1:
            name += f", to step {ends[0]} (the longest: {ends[-1]})"
        for ax, tag, value in ((left, "test/accuracy", lambda a: 100 * (1 - a)), (right, "train/loss", lambda a: a)):
            found = [{line["step"]: value(line[tag]) for line in lines if tag in line} for lines in runs]
            steps = sorted(set.intersection(*map(set, found)))
            if not steps:
                raise UsageError(f"argument --curves: {folder} has no {tag} at a step that all its {len(runs)} seeds share")
            values = np.array([[course[step] for step in steps] for course in found])
            bands = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
            ax.plot(steps, bands[0], color=color, label=name, marker="" if steps[1:] else "o")
            ax.fill_between(steps, *bands[1:], color=color, alpha=0.2, linewidth=0)
            rows += [(i + 1, texts[i], "test error in percent" if ax is left else "training loss", step, len(runs), *numbers)
                     for step, *numbers in zip(steps, *(band.round(6) for band in bands))]
        if (published := published_error(flags)) is not None:
            left.axhline(published, color=color, linestyle="--", linewidth=1,
                         label=f"paper: {ROWS[row_of(flags)].title}, {published} %")
    name_axis(left, "test error in percent")
    name_axis(right, "training loss")
    add_legend(fig, left.get_legend_handles_labels()[0], 9)
    paths = save(fig, save_path / "curves.png", save_path / "curves.pdf")
    head = "line", "name", "measure", "step", "n", "mean", "lowest", "highest"
    write_text(save_path / "curves.csv", csv_text([head, *rows]))
    return [*paths, save_path / "curves.csv"]


def curve_labels(rows):
    """Returns names of lines: row, data, labels and network, and further flags where these are the same; rows: flags."""
    titles = [f"{ROWS[row_of(flags)].title}, {data_name(flags)}, {flags['num_label']} labels, {flags['arch']}"
              for flags in rows]
    more = {title: differing([flags for flags, other in zip(rows, titles) if other == title]) for title in titles}
    return [f"{title}, {label(flags, more[title])}" if more[title] else title for title, flags in zip(titles, rows)]


@matplotlib.rc_context(PLAIN)
def draw_differences(evaluations, path):
    """Writes a figure of one cell: paired differences of test errors over the steps, in their 95 % band; returns its path.

    evaluations: lines of evaluations.csv, of one cell at one scale.
    Raises UsageError without two seeds of a pair of rows.
    """
    fig = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = fig.subplots()
    for color, pair in zip(COLORS, COURSES):
        found = {step: list(differences_of(*both, "test_error").values()) for step, both in courses(evaluations, pair).items()}
        if steps := {step: values for step, values in found.items() if len(values) > 1}:
            mean, half = np.transpose([interval(values) for values in steps.values()])
            ax.plot(list(steps), mean, color=color, label=f"{less(*pair)}, n = {len([*steps.values()][-1])}")
            ax.fill_between(list(steps), mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
    if not ax.lines:
        raise UsageError("no two rows to compare have two seeds in common in results/evaluations.csv: publish more runs")
    ax.axhline(0, color="black", linewidth=1)
    name_axis(ax, "difference in points, 95 % band")
    fig.suptitle(broken(CELLS[evaluations[0]["cell"]].title, 6, 11), fontsize=11)
    add_legend(fig, ax.get_legend_handles_labels()[0], 9)
    return save(fig, path)


def name_axis(ax, name):
    ax.set(xlabel="step", ylabel=name)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def save(fig, *paths):
    """Writes a figure as PNG or PDF, as the names say; returns the paths."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        unsaid = {"CreationDate" if path.suffix == ".pdf" else "Software": None}
        with replacing(path) as file:
            fig.savefig(file, format=path.suffix[1:], dpi=160, facecolor="white", metadata=unsaid)
    return list(paths)
