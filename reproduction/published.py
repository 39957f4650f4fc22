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
FILES = {RUNS: COLUMNS, EVALUATIONS: EVALUATION_COLUMNS}
REPORTS = Path("REPRODUCTION.md"), Path("README.md"), Path("results", "runs.md")


def publish(runs):
    """Brings runs.csv, evaluations.csv, the reports and splits/ up to date with finished runs; returns the paths it wrote.

    Other runs in the two files stay.  Nothing is written before everything has been read and checked.
    """
    names, made = {run_of(run.name) for run in runs}, [run.lines() for run in runs]
    lines, texts = {}, new_splits(runs)
    for path, new in ((RUNS, [line for line, _ in made]), (EVALUATIONS, [line for _, own in made for line in own])):
        for line in new:
            if fault := fault_of(line, FILES[path]):
                raise UsageError(f"the {line['row']} of {line['cell']} with seed {line['seed']} cannot be published: {fault}")
        lines[path] = sorted([line for line in read_lines(path) if run_of(line) not in names] + new, key=order)
        texts[path] = csv_text([FILES[path], *map(dict.values, lines[path])])
    blocks = tables(*lines.values())
    texts |= {path: filled(path, blocks) for path in REPORTS if path.exists()}
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        write_text(path, text)
    return list(texts)


def read_lines(path):
    """Returns the lines of one of FILES, dicts of text.  Raises UsageError for a line that is not whole, or is there twice."""
    if not path.exists():
        return []
    columns, lines, text = FILES[path], {}, read_text(path)
    try:
        table = csv.DictReader(io.StringIO(text), strict=True)
        if table.fieldnames != list(columns) or not text.endswith("\n"):
            raise UsageError(f"{path} has not its columns, {','.join(columns)}, or not its last line: restore it")
        for line in table:
            if fault := fault_of(line, columns) or (order(line) in lines and "the same run is in a line before it"):
                raise UsageError(f"{path}, line {table.line_num}: {fault[:100]}: restore the file, or mend the line")
            lines[order(line)] = line
    except csv.Error as error:
        raise UsageError(f"{path} cannot be read ({error}): restore it") from None
    return list(lines.values())


def fault_of(line, columns):
    """Returns what keeps a line from being that of a run or an evaluation, or None."""
    if None in line or None in line.values():
        return "it has not as many values as there are columns"
    return next((f"{value!r} is no value for {key}" for key, value in line.items()
                 if not re.fullmatch(columns[key], value)), None)


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
