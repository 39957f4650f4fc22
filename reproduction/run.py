"""One run of the tables: its command, its folder under results/reproduce, its lines of runs.csv and evaluations.csv."""
import statistics
from functools import cache
from pathlib import Path

from reproduction.cells import CELLS, ROWS, flags_of_row, folder_of, scaled, training_flags
from reproduction.report import SELECTION_RULES
from utils.errors import UsageError
from utils.experiment import differing, facts, options, plain_flags, resolve_flags
from utils.files import ARGS, METRICS, RESULTS, read_metrics, read_results
from utils.flags import RESUME

SPLITS = Path("splits")
# The columns of runs.csv and evaluations.csv, with the patterns of their values; the first four name the run.
WHOLE, NUMBER, PERCENT = r"[0-9]{1,18}", r"[0-9]{1,9}(\.[0-9]+)?", r"(100(\.0+)?|[0-9]{1,2}(\.[0-9]+)?)"
NAME = {"cell": "|".join(CELLS), "row": "|".join(ROWS), "seed": WHOLE, "scale": NUMBER}
COLUMNS = {**NAME, "steps": WHOLE, **dict.fromkeys(SELECTION_RULES, PERCENT), "best_validation": f"{PERCENT}?",
           "before_decay": f"{PERCENT}?", "labeled": f"{PERCENT}?", "seconds": NUMBER, "device": ".+", "threads": WHOLE,
           "precision": ".+", "torch": ".+", "commit": "[0-9a-f]{40}(-dirty)?"}
EVALUATION_COLUMNS = {**NAME, "step": WHOLE, "test_error": PERCENT, "before": f"{PERCENT}?", "after": f"{PERCENT}?",
                      "meta_shift": f"({NUMBER})?"}
# column -> scalar and its factor: accuracy of the pseudo-labels in percent around the meta step, and how far it moves them
TELEMETRY = {"before": ("train/unlabel-acc", 100), "after": ("train/pseudo-acc", 100), "meta_shift": ("train/meta-shift", 1)}


class Run:
    """One row of a cell, or of an experiment of the user's own, with one seed.

    own: the flags of that experiment, as `own_flags` returns them, or None; `cell` is then a name for its folders.
    """

    def __init__(self, cell, row, seed, scale=1.0, own=None):
        self.cell, self.row, self.seed, self.scale, self.own = cell, row, seed, scale, own
        self.name = dict(zip(NAME, (cell, row, seed, f"{scale:g}")))
        self.flags = training_flags(cell, row, seed, scale) if own is None else flags_of_row(own, row, seed)
        self.folder = folder_of(cell, row, seed, scale)
        self.split = None                   # where the list of its labeled images is published
        if own is None and row != "supervised":
            self.split = SPLITS / f"{CELLS[cell].data_name}-{CELLS[cell].num_label}-seed{seed}.txt"

    def check_start(self):
        """Raises UsageError if the run whose weights it starts from is not finished."""
        start = CELLS[self.cell].start if self.own is None else ()
        if start and Run(*start, self.seed, self.scale).results() is None:
            cell, row = start
            raise UsageError(f"{self.folder} starts from a run that is not finished: python3 reproduce.py ablation --dataset "
                             f"{cell} --rows {row} --first-seed {self.seed} --scale {self.scale:g}")

    def command(self):
        """Returns the flags of train_meta.py; a run that was begun keeps its choice of labeled images, by seed or --split."""
        given = self.split and self.split.exists() and not (self.folder / ARGS).exists()
        return [*self.flags, *(["--split", str(self.split)] if given else []), "--save-path", str(self.folder), "--resume"]

    def results(self):
        """Returns results.json, or None if the run is not finished.  Raises UsageError if it is of another experiment.

        A flag that the run is too old to know counts as left at its default.
        """
        path = self.folder / RESULTS
        if not path.exists():
            return None
        results = read_results(self.folder)
        planned, found = facts(resolved(*self.flags)), facts(results["args"] | {"total_steps": results["steps"]})
        may_differ = options(RESUME) - {"--test-freq", "--total-steps"} | {"--split"}
        if self.own is not None and "num_label" not in self.own:    # the data or the split may say how many
            may_differ |= {"--num-label"}
        for name in differing(planned, found, may_differ):
            raise UsageError(f"{path} is of another experiment than {self.row} of {self.cell}: {name} is {found[name]} "
                             f"there and {planned[name]} here: move it away")
        return results

    def lines(self):
        """Returns its line of runs.csv, column -> text, and those of evaluations.csv, whose means are over the log lines since
        the evaluation before.  Raises UsageError if the run is not finished.
        """
        results, records = self.finished()
        evaluations, since = [], []
        for record in records:
            if "test/accuracy" not in record:
                since.append(record)
                continue
            means = {}
            for name, (tag, factor) in TELEMETRY.items():
                found = [factor * logged[tag] for logged in since if tag in logged]
                means[name] = f"{statistics.mean(found):.4f}" if found else None
            error = round(100 * (1 - record["test/accuracy"]), 4)
            evaluations.append(texts({**self.name, "step": record["step"], "test_error": error, **means}))
            since = []
        decay = min((scaled(m, self.scale) for m in CELLS[self.cell].milestones), default=0)
        before_decay = [line["test_error"] for line in evaluations if int(line["step"]) <= decay]
        values = {**self.name, "steps": results["steps"], **results["error_rate"],
                  "before_decay": before_decay[-1] if before_decay else None, "labeled": results.get("labeled_error_rate"),
                  **results["sessions"][-1], "seconds": round(results["seconds"])}
        return texts({column: values[column] for column in COLUMNS}), evaluations

    def finished(self):
        """Returns results.json and the records of metrics.jsonl.  Raises UsageError if the run is not finished."""
        results, records = self.results(), read_metrics(self.folder)
        if results is None or not records or records[-1]["step"] != results["steps"]:
            raise UsageError(f"{self.folder / METRICS} does not end with the last step of a finished run: restore "
                             "it, or move the run away")
        return results, records


def texts(values):
    """Returns the values of a line as text; None is empty."""
    return {name: "" if value is None else str(value) for name, value in values.items()}


@cache
def resolved(*words):
    """Returns flags of train_meta.py as args.json has them."""
    return plain_flags(resolve_flags(words)[0])
