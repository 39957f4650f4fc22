"""What is published of the runs: their lines in runs.csv and evaluations.csv, the lists in splits/, and the reports."""
import csv
import io
import re
from pathlib import Path

from reproduction.cells import CELLS, ROWS
from reproduction.report import filled, tables
from reproduction.run import COLUMNS, EVALUATION_COLUMNS
from utils.errors import UsageError
from utils.files import INDICES, csv_text, read_split, read_text, write_text

RUNS, EVALUATIONS = Path("results", "runs.csv"), Path("results", "evaluations.csv")
REPORTS = Path("REPRODUCTION.md"), Path("README.md"), Path("results", "runs.md")
WHOLE, NUMBER, PERCENT = r"[0-9]{1,18}", r"[0-9]{1,9}(\.[0-9]+)?", r"100(\.0+)?|[0-9]{1,2}(\.[0-9]+)?"
FORMATS = (dict.fromkeys((*COLUMNS, *EVALUATION_COLUMNS), PERCENT) | dict.fromkeys(("seed", "steps", "step", "threads"), WHOLE)
           | dict.fromkeys(("scale", "seconds", "meta_shift"), NUMBER) | dict.fromkeys(("device", "precision", "torch"), ".+")
           | {"cell": "|".join(CELLS), "row": "|".join(ROWS), "commit": "[0-9a-f]{40}(-dirty)?"})       # column -> pattern
OPTIONAL = {"best_validation", "before_decay", "labeled", "before", "after", "meta_shift"}


def publish(runs):
    """Brings runs.csv, evaluations.csv, the reports and splits/ up to date with finished runs; returns the paths it wrote.

    Other runs in the two files stay.  Nothing is written before everything has been read and checked.
    """
    names, new = {(run.cell, run.row, run.seed, run.scale) for run in runs}, [run.line() for run in runs]
    lines = [line for line in read_runs() if run_of(line) not in names] + new
    evaluations = [line for line in read_evaluations() if run_of(line) not in names]
    evaluations += [line for run in runs for line in run.evaluations()]
    lines, evaluations = sorted(lines, key=order), sorted(evaluations, key=order)
    for line in new:
        if fault := fault_of(line):
            raise UsageError(f"the {line['row']} of {line['cell']} with seed {line['seed']} cannot be published: {fault}")
    blocks = tables(lines, evaluations)
    texts = {**new_splits(runs), RUNS: as_csv(COLUMNS, lines), EVALUATIONS: as_csv(EVALUATION_COLUMNS, evaluations),
             **{path: filled(path, blocks) for path in REPORTS if path.exists()}}
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        write_text(path, text)
    return list(texts)


def as_csv(columns, lines):
    return csv_text([columns, *([line[column] for column in columns] for line in lines)])


def read_runs():
    """Returns the lines of runs.csv, dicts of text.  Raises UsageError, which names the line, for one that is no run."""
    return read_lines(RUNS, COLUMNS)


def read_evaluations():
    """Returns the lines of evaluations.csv, dicts of text.  Raises UsageError for one that is no evaluation."""
    return read_lines(EVALUATIONS, EVALUATION_COLUMNS)


def read_lines(path, columns):
    """Returns the lines of one of the two files.  Raises UsageError for a line that is not whole, or is there twice."""
    if not path.exists():
        return []
    lines, text = {}, read_text(path)
    try:
        table = csv.DictReader(io.StringIO(text), strict=True)
        if tuple(table.fieldnames or ()) != columns or not text.endswith("\n"):
            raise UsageError(f"{path} has not its columns, {','.join(columns)}, or not its last line: restore it")
        for line in table:
            if fault := fault_of(line) or (order(line) in lines and "the same run is in a line before it"):
                raise UsageError(f"{path}, line {table.line_num}: {fault[:100]}: restore the file, or mend the line")
            lines[order(line)] = line
    except csv.Error as error:
        raise UsageError(f"{path} cannot be read ({error}): restore it") from None
    return list(lines.values())


def fault_of(line):
    """Returns what keeps a line from being that of a run or an evaluation, or None."""
    if None in line or None in line.values():
        return "it has not as many values as there are columns"
    return next((f"{value!r} is no value for {key}" for key, value in line.items()
                 if not re.fullmatch(FORMATS[key], value) and (value or key not in OPTIONAL)), None)


def run_of(line):
    return line["cell"], line["row"], int(line["seed"]), float(line["scale"])


def order(line):
    """Returns the place of a line in its file, a key to sort by; two lines of the same run or evaluation have the same."""
    cell, row, seed, scale = run_of(line)
    return list(CELLS).index(cell), -scale, list(ROWS).index(row), seed, int(line.get("step", 0))


def new_splits(runs):
    """Returns path -> text of the lists of labeled images that splits/ does not hold yet.

    Raises UsageError for a run that was trained on another list than the published one.
    """
    texts = {}
    for run in runs:
        if run.split:
            path = run.folder / INDICES
            text = "".join(f"{index}\n" for index in read_split(path))
            published = read_text(run.split) if run.split.exists() else texts.setdefault(run.split, text)
            if text != published:
                raise UsageError(f"{path} is not the list that is published as {run.split}: move the run away")
    return texts
