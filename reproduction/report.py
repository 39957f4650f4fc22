"""The tables of REPRODUCTION.md and README.md, in Markdown, from the lines of results/runs.csv."""
import itertools
import re
import shlex
import statistics

from reproduction.cells import ABLATION, CELLS, ROWS, cell_of, scaled, training_flags
from utils.cli import UsageError
from utils.run_folder import median_name

PAIRS = (("both", "neither"), ("both", "mix-up"), ("both", "beta-0"), ("meta", "neither"),
         ("both", "finite-difference"))     # rows whose errors are subtracted
MOMENTS = {"last": "at the end", "before_decay": "before the decay"}       # column -> when in a run its error is measured
SELECTION_RULES = {"last": "last", "median_last_20": "median of the last 20 evaluations",
                   "best_validation": "best on validation", "best_test": "lowest (selected on the test set)"}
QUARTERS = 1, 2, 3, 4                       # of the steps of a run


def filled(path, blocks):
    """The text of a Markdown file in which the lines between `<!-- name -->` and `<!-- end -->` are the block of that name.

    Raises UsageError, which names the file, for a name without a block and for a block without an end.
    """
    text = path.read_text(encoding="utf-8")
    marks = re.findall(r"<!-- (\S+) -->\n", text + "\n")
    for name, end in itertools.zip_longest(marks[::2], marks[1::2]):
        if name not in blocks or end != "end":
            raise UsageError(f"{path}: <!-- {name} --> " + ("is no block" if name not in blocks else "has no <!-- end -->")
                             + f": restore it (blocks: {', '.join(blocks)})")
    return re.sub(r"<!-- (\S+) -->\n.*?<!-- end -->", lambda match: f"<!-- {match[1]} -->\n{blocks[match[1]]}\n<!-- end -->",
                  text, flags=re.DOTALL)


def tables(lines):
    """name -> Markdown of every block; lines: dicts of text, one a run, in the order of the tables.

    The blocks of one cell, CELL and paired-CELL, show its largest scale.
    """
    groups = {}                         # (cell, scale, row) -> lines
    for line in lines:
        groups.setdefault((line["cell"], float(line["scale"]), line["row"]), []).append(line)
    blocks = {"main": main_table(groups), "ablation": ablation_table(groups), "cells": cells_table(groups),
              "paired": paired_table(groups), "telemetry": telemetry_table(groups), "commands": commands(groups)}
    for name in CELLS:
        largest = max((scale for cell, scale, _ in groups if cell == name), default=None)
        of_cell = {key: group for key, group in groups.items() if key[:2] == (name, largest)}
        blocks[name] = rows_table(of_cell)
        blocks[f"paired-{name}"] = paired_table(of_cell, one_cell=True)
    return blocks


def main_table(groups):
    rows = [[cell.title, *paper_and_measured(groups, [(name, "both"), (name, "supervised")])]
            for name, cell in CELLS.items() if cell.published]
    return markdown(["data set, labels", "paper: MetaSemi", "this code", "paper: fully supervised", "this code"], rows)


def ablation_table(groups):
    names = [name for name, cell in CELLS.items() if set(ABLATION) <= set(cell.published)]
    rows = [[ROWS[row].title, *paper_and_measured(groups, [(name, row) for name in names])] for row in ABLATION]
    return markdown(["row", *(text for name in names for text in (f"{CELLS[name].title}: paper", "this code"))], rows)


def paper_and_measured(groups, pairs):
    """The published error rate and the measured one, for each (cell, row)."""
    for name, row in pairs:
        group = groups.get((name, 1.0, row))
        yield published(name, row)
        yield f"{mean_and_std(group, 'last')} (n = {len(group)})" if group else "not run yet"


def evaluations(line):
    """How many evaluations a run of this cell and scale has."""
    cell, scale = CELLS[line["cell"]], float(line["scale"])
    return -(-scaled(cell.total_steps, scale) // scaled(cell.test_freq, scale))


def rows_table(groups):
    """The rows of one cell at one scale."""
    if not groups:
        return "Not run yet."
    lines = [line for group in groups.values() for line in group]
    titles = SELECTION_RULES | {"median_last_20": median_name(evaluations(lines[0])), "labeled": "on its own labeled images"}
    measured = [column for column in titles if any(line[column] for line in lines)]
    rows = [[ROWS[row].title, str(len(group)), *(mean_and_std(group, column) for column in measured),
             f"{mean(group, 'seconds'):.0f}"] for (*_, row), group in groups.items()]
    return markdown(["row", "n", *map(titles.get, measured), "seconds a run"], rows)


def cells_table(groups):
    rows = []
    for (name, scale, row), group in groups.items():
        hardware = {f"{line['device']}, {line['threads']} thread(s), {line['precision']}, torch {line['torch']}"
                    for line in group}
        count = evaluations(group[0])
        whole = f" (of all {count})" if count <= 20 else ""
        commits = {line["commit"][:10] + "-dirty" * line["commit"].endswith("-dirty") for line in group}
        rows.append([CELLS[name].title, ROWS[row].title, f"{scale:g}", group[0]["steps"], str(len(group)),
                     *(mean_and_std(group, rule) + whole * (rule == "median_last_20") for rule in SELECTION_RULES),
                     published(name, row), *compare_with_paper(name, row, scale, group),
                     f"{mean(group, 'seconds') / 3600:.2f}", "; ".join(sorted(hardware)), ", ".join(sorted(commits))])
    for name, cell in CELLS.items():
        for row in cell.published:
            if (name, 1.0, row) not in groups:
                steps = cell_of(name, row).total_steps
                rows.append([cell.title, ROWS[row].title, "1", str(steps), "0", *("-" for _ in SELECTION_RULES),
                             published(name, row), "-", "not run", "-", "-", "-"])
    return markdown(["cell", "row", "scale", "steps", "n", *SELECTION_RULES.values(), "paper", "difference", "verdict",
                     "hours a run", "hardware", "commit"], rows)


def compare_with_paper(name, row, scale, group):
    """Difference to the published value, and the verdict.

    The published value is taken for that of one run: it is within the band if it lies in the 95 % prediction interval of
    one more run, mean +- t sqrt(1 + 1/n) times the standard deviation over n seeds.
    """
    if row not in CELLS[name].published:
        return "-", "nothing published"
    if scale != 1:
        return "-", f"not comparable at scale {scale:g}"
    from scipy.stats import t

    values = [float(line["last"]) for line in group]
    n, difference = len(values), statistics.mean(values) - CELLS[name].published[row]
    band = t.ppf(0.975, n - 1) * statistics.stdev(values) * (1 + 1 / n) ** 0.5 if n > 1 else 0.0
    verdict = "within the band" if abs(difference) <= band else "worse" if difference > 0 else "better"
    return f"{difference:+.2f}", verdict + (", one seed" if n == 1 else "")


def paired_table(groups, one_cell=False):
    """Differences between two rows of a cell on the same seeds, in points of test error: mean and 95 % t-interval.

    one_cell: whether to leave out the columns cell and scale.
    """
    from scipy.stats import t

    rows = []
    for name, scale in dict.fromkeys(key[:2] for key in groups):
        for (first, second), (rule, when) in itertools.product(PAIRS, MOMENTS.items()):
            a, b = ({line["seed"]: float(line[rule]) for line in groups.get((name, scale, row), ()) if line[rule]}
                    for row in (first, second))
            differences = [a[seed] - b[seed] for seed in a if seed in b]
            if (n := len(differences)) < 2:
                continue
            effect, error = statistics.mean(differences), statistics.stdev(differences) / n ** 0.5
            half = t.ppf(0.975, n - 1) * error
            p = 2 * t.sf(abs(effect) / error, n - 1) if error else float(effect == 0)
            answer = "cannot tell" if half >= abs(effect) else "lower" if effect < 0 else "higher"
            rows.append([CELLS[name].title, f"{scale:g}", f"{ROWS[first].title} less {ROWS[second].title}", when, str(n),
                         f"{effect:+.2f}", f"{effect - half:+.2f} to {effect + half:+.2f}", f"{p:.2g}", answer])
    if not rows:
        return "None yet: a difference takes two rows of a cell with two seeds in common."
    head = ["cell", "scale", "difference", "measured", "n", "mean", "95 % interval", "p", "test error"]
    return markdown(head[2:], [row[2:] for row in rows]) if one_cell else markdown(head, rows)


def telemetry_table(groups):
    """Accuracy of the pseudo-labels before and after the meta step, in the quarters of training."""
    rows = []
    for (name, scale, row), group in groups.items():
        measured = [line for line in group if all(line[f"{when}-{k}"] for when in ("before", "after") for k in QUARTERS)]
        if measured:
            pairs = [(mean(measured, f"before-{k}"), mean(measured, f"after-{k}")) for k in QUARTERS]
            rows.append([CELLS[name].title, ROWS[row].title, f"{scale:g}", str(len(measured)),
                         *(f"{before:.2f} → {after:.2f}" for before, after in pairs),
                         f"{statistics.mean(after - before for before, after in pairs):+.2f}"])
    return markdown(["cell", "row", "scale", "n", "first quarter", "second", "third", "last", "mean gain"], rows)


def commands(groups):
    return "\n\n".join(
        f"    # {CELLS[name].title}, {ROWS[row].title}, scale {scale:g}: S = {', '.join(line['seed'] for line in group)}\n"
        f"    python3 train_meta.py {shlex.join(training_flags(name, row, 'S', scale))}"
        for (name, scale, row), group in groups.items()) or "None yet."


def markdown(head, rows):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def published(name, row):
    value = CELLS[name].published.get(row)
    return "-" if value is None else f"{value:.2f}"


def mean_and_std(group, rule):
    """Mean and standard deviation over the seeds; one seed has none."""
    values = [float(line[rule]) for line in group if line[rule]]
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def mean(group, column):
    return statistics.mean(float(line[column]) for line in group)
