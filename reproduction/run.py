"""One run of the tables: its command, its folder under results/reproduce, and its line of results/runs.csv."""
import re
import statistics
from contextlib import suppress
from functools import cache
from pathlib import Path

from reproduction.cells import CELLS, ROWS, folder_of, scaled, training_flags
from reproduction.report import QUARTERS, SELECTION_RULES
from utils import flags
from utils.cli import UsageError, option
from utils.files import ARGS, LOG, METRICS, RESULTS
from utils.records import read_flags, read_metrics, read_results

FOLDERS, SPLITS = Path("results", "reproduce"), Path("splits")
COLUMNS = ("cell", "row", "seed", "scale", "steps", *SELECTION_RULES, "before_decay", "labeled",
           *(f"before-{k}" for k in QUARTERS), *(f"after-{k}" for k in QUARTERS),
           "seconds", "device", "threads", "precision", "torch", "commit")


class Run:
    """One row of a cell with one seed."""

    def __init__(self, cell, row, seed, scale):
        self.cell, self.row, self.seed, self.scale = cell, row, seed, scale
        self.flags = training_flags(cell, row, seed, scale)
        self.folder = folder_of(cell, row, seed, scale)
        self.split = None                   # where the list of its labeled images is published
        if row != "supervised":
            self.split = SPLITS / f"{CELLS[cell].data_name}-{CELLS[cell].num_label}-seed{seed}.txt"

    def command(self):
        """The flags of train_meta.py.  A run that was begun keeps its choice of labeled images, by the seed or by --split."""
        given = self.split is not None and self.split.exists()
        if (self.folder / ARGS).exists():
            given = read_flags(self.folder).get("split") is not None
        return [*self.flags, *(["--split", str(self.split)] if given else []), "--save-path", str(self.folder), "--resume"]

    def results(self):
        """results.json, or None if the run is not finished.  Raises UsageError if it is of another experiment.

        A flag that the run is too old to know counts as left at its default.
        """
        path = self.folder / RESULTS
        if not path.exists():
            return None
        results = read_results(self.folder)
        found = {**resolved(), **results["args"], "total_steps": results["steps"]}
        planned = resolved(*self.flags)
        may_differ = flags.with_role(flags.RESUME) - {"test_freq", "total_steps"} | {"split"}
        if name := flags.difference(planned, found, may_differ):
            raise UsageError(f"{path} is of another experiment than {self.row} of {self.cell}: {option(name)} is {found[name]} "
                             f"there and {planned[name]} here: move it away")
        return results

    def line(self):
        """Its line of runs.csv, column -> text.  Raises UsageError if the run is not finished."""
        results, records = self.results(), read_metrics(self.folder)
        if results is None or not records or records[-1]["step"] != results["steps"]:
            raise UsageError(f"{self.folder / METRICS} does not end with the last step of a finished run: restore "
                             "it, or move the run away")
        values = {"cell": self.cell, "row": self.row, "seed": self.seed, "scale": f"{self.scale:g}", "steps": results["steps"],
                  **results["error_rate"], "before_decay": self.error_before_decay(records),
                  "labeled": results.get("labeled_error_rate"), **results["sessions"][-1], "seconds": round(results["seconds"])}
        for name, tag in (("before", "train/unlabel-acc"), ("after", "train/pseudo-acc")):      # the meta step
            for k in QUARTERS:
                quarter = [r[tag] for r in records if tag in r and k - 1 < 4 * r["step"] / results["steps"] <= k]
                values[f"{name}-{k}"] = f"{100 * statistics.mean(quarter):.2f}" if quarter else None
        return {column: "" if values[column] is None else str(values[column]) for column in COLUMNS}

    def error_before_decay(self, records):
        """Test error in percent at the last evaluation before the learning rate first decays, or None."""
        decay = min((scaled(m, self.scale) for m in CELLS[self.cell].milestones), default=0)
        accuracies = [record["test/accuracy"] for record in records if "test/accuracy" in record and record["step"] <= decay]
        return round(100 * (1 - accuracies[-1]), 4) if accuracies else None

    def progress(self):
        """The last step, test error and time left that its log tells of, in one line; "" before it does."""
        log = ""
        with suppress(OSError):
            log = (self.folder / LOG).read_text(encoding="utf-8", errors="replace")
        patterns = r"  (step \d+/\d+)  ", r"  (test error \S+ %)", r"images/s  (.+ left)"
        told = (re.findall(pattern, log)[-1:] for pattern in patterns)
        return ", ".join(text for texts in told for text in texts)


@cache
def resolved(*words):
    """Flags of train_meta.py as args.json has them."""
    return flags.experiment(flags.parse_training(words))


def finished_runs():
    """All finished runs in results/reproduce."""
    for path in FOLDERS.glob(f"*/*/{RESULTS}"):
        match = re.fullmatch(r"(.+)-([0-9]+(?:\.[0-9]+)?)/(.+)-([0-9]+)", str(path.parent.relative_to(FOLDERS)))
        if match and match[1] in CELLS and match[3] in ROWS:
            run = Run(match[1], match[3], int(match[4]), float(match[2]))
            if run.folder == path.parent:
                yield run
