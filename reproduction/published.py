"""What is published of the runs: results/runs.csv, a line for each, the lists in splits/, and the reports made of them."""
import csv
import hashlib
import io
import re
from pathlib import Path

from reproduction.cells import CELLS, ROWS
from reproduction.report import SELECTION_RULES, filled, tables
from reproduction.run import COLUMNS, SPLITS
from utils.cli import UsageError
from utils.files import INDICES, write_text
from utils.records import read_split

RUNS = Path("results", "runs.csv")
REPORTS = Path("REPRODUCTION.md"), Path("README.md")
SUMS = SPLITS / "SHA256SUMS"
TEXT = {"cell", "row", "device", "threads", "precision", "torch", "commit"}
REQUIRED = {"cell", "row", "seed", "scale", "steps", *SELECTION_RULES, "seconds"} - {"best_validation"}


def publish(runs):
    """Brings runs.csv, the reports and splits/ up to date with finished runs; returns the paths that it wrote.

    Other runs in runs.csv stay.  Nothing is written before everything has been read and checked.
    """
    lines = {order(line): line for line in (*read_runs(), *(run.line() for run in runs))}
    lines = [lines[key] for key in sorted(lines)]
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    blocks = tables(lines)
    texts = {**new_splits(runs), RUNS: table.getvalue(), **{path: filled(path, blocks) for path in REPORTS if path.exists()}}
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        write_text(path, text)
    return list(texts)


def read_runs():
    """The lines of runs.csv, dicts of text.  Raises UsageError, which names the line, for one that is no run, or a run that is
    there twice.
    """
    if not RUNS.exists():
        return []
    lines = {}
    try:
        table = csv.DictReader(io.StringIO(RUNS.read_text(encoding="utf-8")), strict=True)
        if missing := REQUIRED - {*(table.fieldnames or ())}:
            raise UsageError(f"{RUNS} has no columns {', '.join(sorted(missing))}: restore it")
        for line in table:
            if fault := fault_of(line) or (order(line) in lines and "the same run is in a line before it"):
                raise UsageError(f"{RUNS}, line {table.line_num}: {fault[:100]}: restore the file, or mend the line")
            lines[order(line)] = {**dict.fromkeys(COLUMNS, ""), **line}     # a younger column is empty
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{RUNS} cannot be read ({error}): restore it") from None
    return list(lines.values())


def fault_of(line):
    """What keeps a line of runs.csv from being a run, or None."""
    if None in line or None in line.values():
        return "it has not as many values as there are columns"
    for key, known in (("cell", CELLS), ("row", ROWS)):
        if line[key] not in known:
            return f"{line[key]!r} is no {key}"
    for key in line.keys() - TEXT:
        rule = r"[0-9]{1,18}" if key in ("seed", "steps") else r"[0-9]{1,9}(\.[0-9]+)?"
        if key not in COLUMNS:
            return f"{key!r} is no column of it"
        if not re.fullmatch(rule, line[key]) and (line[key] or key in REQUIRED):
            return f"{line[key]!r} is no number for {key}"
    return None


def order(line):
    """The place of a line in the tables, a key to sort by.  Two lines of the same run have the same."""
    return list(CELLS).index(line["cell"]), -float(line["scale"]), list(ROWS).index(line["row"]), int(line["seed"])


# Lists of labeled images

def new_splits(runs):
    """path -> text: the lists of labeled images that splits/ does not hold yet, and SHA256SUMS with their sums.

    Raises UsageError for a run that was trained on another list than the published one.
    """
    texts = {}
    for run in runs:
        if run.split:
            check_split(run)
            path = run.folder / INDICES
            text = "".join(f"{index}\n" for index in read_split(path))
            published = run.split.read_text(encoding="utf-8") if run.split.exists() else texts.setdefault(run.split, text)
            if text != published:
                raise UsageError(f"{path} is not the list that is published as {run.split}: move the run away")
    if texts:
        sums = {**read_sums(), **{path.name: sha256(text.encode()) for path, text in texts.items()}}
        texts[SUMS] = "".join(f"{value}  {name}\n" for name, value in sorted(sums.items()))
    return texts


def check_split(run):
    """Raises UsageError if the published list of a run's labeled images is not the one that was recorded."""
    if run.split and run.split.exists() and read_sums().get(run.split.name) != sha256(run.split.read_bytes()):
        raise UsageError(f"{run.split} is not the list whose SHA-256 is in {SUMS}: restore it")


def read_sums():
    """file name -> SHA-256, in the format of sha256sum."""
    lines = SUMS.read_text(encoding="utf-8", errors="replace").splitlines() if SUMS.exists() else ()
    for line in lines:
        if not re.fullmatch(r"[0-9a-f]{64}  \S+", line):
            raise UsageError(f"{SUMS} is damaged: {line[:40]!r} is not a sum and a name: restore it")
    return {name: value for value, name in map(str.split, lines)}


def sha256(data):
    return hashlib.sha256(data).hexdigest()
