"""The tables of REPRODUCTION.md, README.md and results/runs.md, from the lines of results/runs.csv and evaluations.csv."""
import re
import shlex
import statistics

import numpy as np
from scipy.special import stdtr, stdtrit

from reproduction.cells import ABLATION, CELLS, ROWS, training_flags
from utils.errors import UsageError
from utils.files import read_text

PAIRS = (("both", "neither"), ("both", "mix-up"), ("both", "beta-0"), ("beta-0", "mix-up"), ("meta", "neither"),
         ("both", "finite-difference"))     # rows whose errors are subtracted
COURSES = PAIRS[1:3]                        # those whose course is shown over the steps
MOMENTS = {"last": "at the end", "before_decay": "before the decay"}       # column -> when in a run its error is measured
SELECTION_RULES = {"last": "last", "median_last_20": "median of the last 20 evaluations, or all",
                   "best_validation": "best on validation", "best_test": "lowest (selected on the test set)"}
TITLES = SELECTION_RULES | {"labeled": "on its own labeled images", "seconds": "seconds a run"}     # column -> head
EIGHTHS = 1, 2, 4, 6, 7, 8                  # of the steps of a run, where the table of its course has a line
CONTRAST = "n", "mean", "95 % interval", "p", "test error"              # heads of what `contrast` returns
MATTERS = 1.0                               # points of test error; a smaller difference does not matter
STARTS = {"both": "cifar10-jpeg-500-from-both", "mix-up": "cifar10-jpeg-500-from-mix-up"}     # row -> cell that starts from it
APART = {*STARTS.values(), "cifar10-jpeg-500-start"}    # cells that `start_table` shows


def filled(path, blocks):
    """Returns the text of a Markdown file with the block of each name between its `<!-- name -->` and `<!-- end -->`.

    Raises UsageError, which names the file, for one that is no block and one without an end.
    """
    def block(match):
        name, end = match.groups()
        if name not in blocks or end != "end":
            raise UsageError(f"{path}: <!-- {name} --> is no block, or has no <!-- end -->: restore it (blocks: "
                             f"{', '.join(blocks)})")
        return f"<!-- {name} -->\n{blocks[name]}\n<!-- end -->"

    return re.sub(r"<!-- (\S+) -->\n(?:.*?<!-- (\S+) -->)?", block, read_text(path), flags=re.DOTALL)


def tables(lines, evaluations=()):
    """Returns name -> Markdown of every block.

    lines, evaluations: dicts of text, the lines of the two files in their order.
    The blocks of one cell, CELL, small-CELL, paired-CELL and course-CELL, show its largest scale; those of a question,
    ROW-less-ROW, that of every cell.
    """
    groups, largest = {}, {}            # (cell, scale, row) -> its lines; cell -> its largest scale, which comes first
    for line in lines:
        groups.setdefault((line["cell"], float(line["scale"]), line["row"]), []).append(line)
    rows = {name: {} for name in CELLS}         # cell -> row -> its lines at that scale
    for (name, scale, row), group in groups.items():
        if scale == largest.setdefault(name, scale):
            rows[name][row] = group
    compared = [name for name in CELLS if name not in APART]
    blocks = {"paper": paper_table(groups), "cells": cells_table(groups), "commands": commands(groups),
              "start": start_table(groups)}
    for pair in PAIRS:
        blocks["-less-".join(pair)] = contrasts_table("cell", [(CELLS[name].title, rows[name], pair) for name in compared])
    for name in CELLS:
        errors = [([ROWS[row].title], group) for row, group in rows[name].items()]
        blocks[name] = error_table(["row"], errors)
        blocks[f"small-{name}"] = error_table(["method"], errors, columns=("last", "labeled"))
        blocks[f"paired-{name}"] = contrasts_table("difference", [(less(*pair), rows[name], pair) for pair in PAIRS])
        blocks[f"course-{name}"] = course_table([line for line in evaluations if line["cell"] == name
                                                 and float(line["scale"]) == largest.get(name)])
    return blocks


def paper_table(groups):
    """Returns the table of the published error rates, with what this code has measured and the verdict on it beside them."""
    names = [name for name, cell in CELLS.items() if cell.published]
    rows = [[ROWS[row].title, *(text for name in names for text in paper_and_measured(name, row, groups))]
            for row in (*ABLATION, "supervised")]
    return markdown(["row", *(text for name in names for text in (f"{CELLS[name].title}: paper", "this code"))], rows)


def paper_and_measured(name, row, groups):
    """Returns the published error rate, and the measured one with its verdict, as text.

    The published value is taken for that of one run: it is within the band if it lies in the 95 % prediction interval of
    one more run, mean +- t sqrt(1 + 1/n) times the standard deviation over n seeds.
    """
    published, group = CELLS[name].published.get(row), groups.get((name, 1.0, row), ())
    if published is None:
        return "-", "-"
    if not group:
        return f"{published:.2f}", "not run yet"
    values = [float(line["last"]) for line in group]
    n, difference = len(values), statistics.mean(values) - published
    band = stdtrit(n - 1, 0.975) * statistics.stdev(values) * (1 + 1 / n) ** 0.5 if n > 1 else 0.0
    verdict = "within the band" if abs(difference) <= band else "worse" if difference > 0 else "better"
    return f"{published:.2f}", f"{mean_and_std(group, 'last')} (n = {n}): {difference:+.2f}, {verdict}"


def error_table(head, rows, form=None, columns=None):
    """Returns a table of n, error rates in percent and seconds of some rows: (cells that name the row, its lines).

    form: `markdown`, or another function of a head and rows.  columns: which of TITLES; by default those that were measured.
    """
    if not rows:
        return "Not run yet."
    columns = columns or [column for column in TITLES if any(line[column] for _, group in rows for line in group)]
    return (form or markdown)([*head, "n", *map(TITLES.get, columns)], [
        [*cells, str(len(group)), *(mean_and_std(group, column) for column in columns)] for cells, group in rows])


def cells_table(groups):
    """Returns the table of all runs, with the hardware and the commits that made them."""
    rows = []
    for (name, scale, row), group in groups.items():
        hardware = {f"{line['device']}, {line['threads']} thread(s), {line['precision']}, torch {line['torch']}"
                    for line in group}
        commits = {line["commit"][:10] + "-dirty" * line["commit"].endswith("-dirty") for line in group}
        rows.append(([CELLS[name].title, ROWS[row].title, f"{scale:g}", group[0]["steps"], "; ".join(sorted(hardware)),
                      ", ".join(sorted(commits))], group))
    return error_table(["cell", "row", "scale", "steps", "hardware", "commit"], rows)


def interval(differences):
    """Returns the mean of some differences, and half the width of its 95 % interval by Student's t."""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return statistics.mean(differences), float(stdtrit(len(differences) - 1, 0.975)) * error


def contrast(differences):
    """Returns n, mean, 95 % interval, p and verdict of differences of test errors in points, as text.

    The verdict: "lower" or "higher" if the interval leaves out zero; "no difference that matters" if it lies within one point
    either way; otherwise "cannot tell".
    """
    n, (effect, half) = len(differences), interval(differences)
    p = 2 * float(stdtr(n - 1, -abs(effect) / half * stdtrit(n - 1, 0.975))) if half else 1.0
    verdict = ("cannot tell" if not half            # equal differences say nothing of their spread
               else "lower" if effect < -half else "higher" if effect > half
               else "no difference that matters" if abs(effect) + half <= MATTERS else "cannot tell")
    return [str(n), f"{effect:+.2f}", f"{effect - half:+.2f} to {effect + half:+.2f}", f"{p:.2g}", verdict]


def differences_of(first, second, rule):
    """Returns seed -> error of one row less that of another; {} if a row has a seed twice."""
    a, b = ({line["seed"]: line[rule] for line in group} for group in (first, second))
    if len(a) + len(b) < len(first) + len(second):
        return {}
    return {seed: float(a[seed]) - float(b[seed]) for seed in a if seed in b and a[seed] and b[seed]}


def paired(first, second, rule="last"):
    """Returns the `contrast` of two rows on the seeds that they share, or None if these are fewer than two."""
    differences = differences_of(first, second, rule)
    return contrast(list(differences.values())) if len(differences) > 1 else None


def less(first, second):
    return f"{ROWS[first].title} less {ROWS[second].title}"


def contrasts_table(head, places):
    """Returns the table of differences between two rows on the same seeds, in points of test error, at each of MOMENTS.

    places: (what the first column says, row -> its lines, the two rows).
    """
    found = [[name, when, *contrast] for name, rows, pair in places for rule, when in MOMENTS.items()
             if (contrast := paired(*(rows.get(row, ()) for row in pair), rule))]
    return markdown([head, "measured", *CONTRAST], found) if found else (
        "None yet: a difference takes two rows of a cell with two seeds in common.")


def courses(evaluations, pair):
    """Returns step -> (lines of the first row, those of the second), of one cell at one scale, in the order of the steps."""
    steps = {}
    for line in evaluations:
        if line["row"] in pair:
            steps.setdefault(int(line["step"]), ([], []))[pair.index(line["row"])].append(line)
    return dict(sorted(steps.items()))


def course_table(evaluations):
    """Returns the table of paired differences at a few steps, with the pseudo-labels of both rows and the meta-shift there."""
    def shown(lines, column, digits=2):
        own = [line[column] for line in lines if line["seed"] in seeds]
        return f"{statistics.mean(map(float, own)):.{digits}f}" if all(own) else "-"

    rows = []
    for pair in COURSES:
        steps = courses(evaluations, pair)
        for step in dict.fromkeys(max((s for s in steps if 8 * s <= k * max(steps)), default=0) for k in EIGHTHS):
            if step and (found := paired(*steps[step], "test_error")):
                first, second = steps[step]
                seeds = differences_of(first, second, "test_error")
                rows.append([less(*pair), str(step), *found, f"{shown(first, 'before')} → {shown(first, 'after')}",
                             shown(second, "before"), shown(first, "meta_shift", 4)])
    head = ["difference", "step", *CONTRAST, "pseudo-labels right, %", "in the second row", "meta-shift"]
    return markdown(head, rows) if rows else "None yet."


def start_table(groups):
    """Returns the tables of the four arms, which start from two sets of weights and go on with two rows: means, contrasts."""
    arms = {(start, row): {line["seed"]: float(line["last"]) for line in groups.get((cell, 1.0, row), ())}
            for start, cell in STARTS.items() for row in STARTS}
    seeds = sorted(set.intersection(*map(set, arms.values())), key=int)
    if len(seeds) < 2:
        return "None yet."
    means = [[ROWS[start].title, ROWS[row].title, str(len(seeds)), f"{statistics.mean(map(errors.get, seeds)):.2f}"]
             for (start, row), errors in arms.items()]
    errors = np.reshape([[own[seed] for seed in seeds] for own in arms.values()], (2, 2, -1))       # start, row, seed
    names, contrasts = [*(ROWS[row].title for row in STARTS), "either: the mean"], []
    for title, (both, mix_up) in (
            ("weights of MetaSemi less those of mix-up only, going on with {}", errors),
            ("going on with MetaSemi less with mix-up only, from the weights of {}", errors.swapaxes(0, 1))):
        values = both - mix_up
        contrasts += [[title.format(name), *contrast(own)] for name, own in zip(names, [*values, values.mean(axis=0)])]
    return (markdown(["weights at step 6,000", "going on with", "n", "last"], means) + "\n\n"
            + markdown(["difference", *CONTRAST], contrasts))


def commands(groups):
    return "\n\n".join(
        f"    # {CELLS[name].title}, {ROWS[row].title}, scale {scale:g}: S = {', '.join(line['seed'] for line in group)}\n"
        f"    python3 train_meta.py {shlex.join(training_flags(name, row, 'S', scale))}"
        for (name, scale, row), group in groups.items()) or "None yet."


def markdown(head, rows):
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean_and_std(group, column):
    """Returns mean and standard deviation over the seeds, of which one seed has none; of seconds the mean."""
    values = [float(line[column]) for line in group if line[column]]
    if column == "seconds":
        return f"{statistics.mean(values):.0f}"
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
