"""The paper's tables: runs what is missing, collects what is there, writes the report.

    python3 reproduce.py main --seeds 3                             # MetaSemi and fully supervised
    python3 reproduce.py ablation --dataset cifar10 --gpus 0 1      # its rows, on two GPUs
    python3 reproduce.py ablation --dataset digits --seeds 5        # on a CPU
    python3 reproduce.py figure3 --dataset svhn
    python3 reproduce.py curves --dataset cifar10 --scale 0.05
    python3 reproduce.py imagenet                                   # only prints the plan and its cost

Each run is one command of train_meta.py with a folder of its own under results/reproduce; --dry-run prints them.  A run that
is finished is not repeated, one that was begun is continued.  `main` and `ablation` write results/runs.csv, a line for each
run, and from it REPRODUCTION.md and the tables of README.md.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))        # python -P leaves it out

from utils.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once("reproduce.py")      # first of all: the other imports take a while

import csv
import ctypes
import fcntl
import hashlib
import io
import queue
import re
import shlex
import signal
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from utils import flags, run_folder
from utils.cli import Parser, UsageError, fail, number, open_standard_streams, option, refuse_idle
from utils.files import open_lock, printable, write_text
from utils.paper import ABLATION, CELLS, ROWS, experiment, scaled, work
from utils.records import read_flags, read_metrics, read_results, read_split
from utils.report import RULES, filled, tables

PROG = "reproduce.py"
HERE = Path(__file__).parent
TABLES = {"main": ("both", "supervised"), "ablation": (*ABLATION, "beta-0"), "figure3": ("neither", "both"), "curves": ABLATION,
          "imagenet": ("neither", "both", "supervised")}
TORCHRUN, RATE = "torchrun --nproc-per-node=8", 0.35 * 790e12     # 35 % of a bfloat16 matrix product on an H200
RUNS, FOLDERS = Path("results", "runs.csv"), Path("results", "reproduce")
REPORTS = Path("REPRODUCTION.md"), Path("README.md")
SPLITS, SUMS = Path("splits"), Path("splits", "SHA256SUMS")
QUARTERS = 1, 2, 3, 4
COLUMNS = ("cell", "row", "seed", "scale", "steps", *RULES, "before_decay", "labeled", *(f"before-{k}" for k in QUARTERS),
           *(f"after-{k}" for k in QUARTERS), "seconds", "device", "threads", "precision", "torch", "commit")
TEXT = {"cell", "row", "device", "threads", "precision", "torch", "commit"}
REQUIRED = {"seed", "scale", "steps", "last", "median_last_20", "best_test", "seconds"}
LIBC = ctypes.CDLL(None)


def main(argv=None):
    open_standard_streams()
    args = parse(argv)
    end_at_once(PROG)                                       # and the runs with this program, see `end_with_parent`
    runs = [Run(cell, row, CELLS[cell].seed + i, args.scale)
            for cell in args.dataset for i in range(args.seeds) for row in TABLES[args.table]]
    try:
        if args.table == "imagenet":
            print_imagenet(args.seeds, args.scale)
            return 0
        if args.dry_run:
            for run in runs:
                print(shlex.join(["python3", "train_meta.py", *run.flags()]))
            return 0
        lock = run_folder.RunFolder(RUNS.parent)            # against a second program that starts the same runs
        lock.lock()
        print_plan(runs)
        failures = run_all([run for run in runs if not run.results()], args.gpus, args.jobs)
        if args.table in ("main", "ablation"):
            print(write_report())
        elif not failures:
            failures = draw(args.table, runs)
        lock.close()
    except UsageError as error:
        fail(PROG, error, 2)
    except OSError as error:
        fail(PROG, error, 1)
    for failure in failures:
        print(f"{PROG}: {printable(failure)}", file=sys.stderr)
    return 1 if failures else 0


def parse(argv):
    parser = Parser(prog=PROG, description=__doc__)
    parser.add_argument("table", choices=TABLES, help="; ".join(f"{name}: {' '.join(rows)}" for name, rows in TABLES.items()))
    parser.add_argument("--dataset", nargs="+", choices=CELLS, default=["svhn", "cifar10", "cifar100"],
                        help="cells of the table (default: svhn cifar10 cifar100)")
    parser.add_argument("--seeds", type=number(int, low=1, high=1000), default=1, metavar="N",
                        help="runs of each row, with seeds one apart (default: 1)")
    parser.add_argument("--scale", type=number(float, low=1e-4, high=1), default=1.0, metavar="X",
                        help="share of the steps, milestones, warm-up and evaluation interval (default: 1)")
    parser.add_argument("--gpus", nargs="+", type=number(int, low=0, high=1023), metavar="N",
                        help="GPUs that share the runs, one run on each at a time")
    parser.add_argument("--jobs", type=number(int, low=1, high=1024), default=1, metavar="N",
                        help="without --gpus: runs side by side, which share the cores (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the command of each run, and do nothing")
    args = parser.parse_args(argv)
    if args.gpus:
        refuse_idle(parser, args, "--gpus", ("jobs",))
    if args.table == "imagenet":
        refuse_idle(parser, args, "the table imagenet, which runs nothing", ("gpus", "jobs"))
    return args


class Run:
    """One row of a cell with one seed: its command, its folder and what it left there."""

    def __init__(self, cell, row, seed, scale):
        self.cell, self.row, self.seed, self.scale = cell, row, seed, scale
        self.folder = FOLDERS / f"{cell}-{scale:g}" / f"{row}-{seed}"
        self.split = SPLITS / f"{CELLS[cell].data}-{CELLS[cell].num_label}-seed{seed}.txt"
        self.has_split = row != "supervised"

    def flags(self):
        split = self.split.exists() and self.has_split
        if (self.folder / "args.json").exists():            # as it was begun
            split = read_flags(self.folder).get("split") is not None
        return [*experiment(self.cell, self.row, self.seed, self.scale), *(["--split", str(self.split)] if split else []),
                "--save-path", str(self.folder), "--resume"]

    def results(self):
        """results.json, or None if the run is not finished; raises UsageError if it is not of this run."""
        path = self.folder / "results.json"
        if not path.exists():
            return None
        results = read_results(self.folder)
        planned = flags.experiment(flags.parse_training(experiment(self.cell, self.row, self.seed, self.scale)))
        found = {**results["args"], "total_steps": results["steps"]}
        free = flags.with_role(flags.RESUME) - {"test_freq", "total_steps"} | {"split"}
        if name := flags.difference(planned, found, free):
            raise UsageError(f"{path} is of another experiment than {self.row} of {self.cell}: {option(name)} is "
                             f"{found.get(name)} there and {planned[name]} here: move it away")
        return results

    def line(self):
        """column -> text of a finished run."""
        result, records = self.results(), read_metrics(self.folder)
        if result is None or not records or records[-1]["step"] != result["steps"]:
            raise UsageError(f"{self.folder / 'metrics.jsonl'} does not end with the last step of a finished run: restore it, "
                             "or move the run away")
        values = {"cell": self.cell, "row": self.row, "seed": self.seed, "scale": f"{self.scale:g}", "steps": result["steps"],
                  **result["error_rate"], "before_decay": self.before_decay(records),
                  "labeled": result.get("labeled_error_rate"), **result["sessions"][-1], "seconds": round(result["seconds"])}
        for part, tag in (("before", "train/unlabel-acc"), ("after", "train/pseudo-acc")):
            for k in QUARTERS:
                quarter = [r[tag] for r in records if tag in r and k - 1 < 4 * r["step"] / result["steps"] <= k]
                values[f"{part}-{k}"] = f"{100 * statistics.mean(quarter):.2f}" if quarter else None
        return {key: "" if values[key] is None else str(values[key]) for key in COLUMNS}

    def before_decay(self, records):
        """Test error in percent at the last evaluation before the learning rate first decays, or None."""
        decay = min((scaled(m, self.scale) for m in CELLS[self.cell].milestones), default=0)
        errors = [100 * (1 - r["test/accuracy"]) for r in records if "test/accuracy" in r and r["step"] <= decay]
        return round(errors[-1], 4) if errors else None


# Running

def print_imagenet(seeds, scale):
    """The commands of the ImageNet table, one run on all GPUs at a time, and hours on paper: none has been measured."""
    print("| row | FLOP | hours on 1 H200 | on 8, without loss between them |\n|---|---|---|---|")
    for row in TABLES["imagenet"]:
        hours = work("imagenet", row, scale) / RATE / 3600
        print(f"| {ROWS[row].title} | {work('imagenet', row, scale):.2g} | {hours:.1f} | {hours / 8:.1f} |")
    print(f"\nat {RATE / 1e12:.0f} TFLOP/s a GPU, 35 % of a large bfloat16 matrix product: an assumption, not a measurement\n")
    for row in TABLES["imagenet"]:
        for seed in range(CELLS["imagenet"].seed, CELLS["imagenet"].seed + seeds):
            flags = Run("imagenet", row, seed, scale).flags()
            print(f"{TORCHRUN} train_meta.py {shlex.join(flags)} --precision bfloat16")


def print_plan(runs):
    """What there is to do, with hours by the speed of the finished runs of the same network."""
    speeds = {}
    for line in read_runs(finished=True):
        speed = work(line["cell"], line["row"], float(line["scale"])) / max(1.0, float(line["seconds"]))
        speeds.setdefault(CELLS[line["cell"]].arch, []).append(speed)
    print("| run | state | FLOP | hours |\n|---|---|---|---|")
    for run in runs:
        state = "finished" if run.results() else "begun" if run.folder.exists() else "to do"
        flop, speed = work(run.cell, run.row, run.scale), speeds.get(CELLS[run.cell].arch)
        hours = f"{flop / statistics.median(speed) / 3600:.2g}" if speed else "unknown until one such run is finished"
        print(f"| {run.folder} | {state} | {flop:.2g} | {hours} |", flush=True)


def run_all(runs, gpus, jobs):
    """Runs side by side, one on each GPU or `jobs` that share the CPU; returns what went wrong, a line each."""
    slots, failures = queue.SimpleQueue(), []
    cpu = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    environments = [{"CUDA_VISIBLE_DEVICES": str(gpu)} for gpu in gpus] if gpus else [cpu] * jobs
    for environment in environments:
        slots.put(environment)

    def start(run):
        environment = slots.get()
        try:
            check_split(run)
            run.folder.mkdir(parents=True, exist_ok=True)
            with open_lock(run.folder / ".lock") as lock:   # a run of a program that was killed is still saving
                fcntl.flock(lock, fcntl.LOCK_EX)
            return subprocess.run([sys.executable, HERE / "train_meta.py", *run.flags()], env={**os.environ, **environment},
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                                  preexec_fn=end_with_parent, start_new_session=True)
        finally:
            slots.put(environment)

    with ThreadPoolExecutor(len(environments)) as pool:
        for run, done in zip(runs, pool.map(start, runs)):
            if done.returncode:
                failures.append(f"{run.folder}: exit code {done.returncode}: {done.stderr.strip()}")
            else:
                try:
                    record_split(run)
                    line = run.line()
                except UsageError as error:
                    failures.append(str(error))
                    continue
                print(f"{run.folder}: test error {float(line['last']):.2f} %, {line['seconds']} s", flush=True)
    return failures


def end_with_parent():
    """In a child before it starts: SIGTERM, on which it saves, as soon as this program ends, however it does."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGTERM)                       # PR_SET_PDEATHSIG


def check_split(run):
    """Raises UsageError if a list in splits/ is not the one that was recorded."""
    if run.split.exists() and read_sums().get(run.split.name) != sha256(run.split.read_bytes()):
        raise UsageError(f"{run.split} is not the list whose SHA-256 is in {SUMS}: restore it")


def record_split(run):
    """Keeps the labeled images of a run whose list is not in splits/ yet, for all later ones."""
    if run.has_split and not run.split.exists():
        text = "".join(f"{index}\n" for index in read_split(run.folder / "label_indices.txt"))
        SPLITS.mkdir(exist_ok=True)
        sums = {**read_sums(), run.split.name: sha256(text.encode())}
        write_text(SUMS, "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())))
        write_text(run.split, text)


def read_sums():
    """file name -> SHA-256, in the format of sha256sum."""
    lines = SUMS.read_text(encoding="utf-8", errors="replace").splitlines() if SUMS.exists() else ()
    for line in lines:
        if not re.fullmatch(r"[0-9a-f]{64}  \S+", line):
            raise UsageError(f"{SUMS} is damaged: {line[:40]!r} is not a sum and a name: restore it")
    return {name: value for value, name in map(str.split, lines)}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def draw(table, runs):
    """Figure 3 of the first seed, or the curves of all, for each cell; returns what went wrong."""
    failures = []
    for folder in dict.fromkeys(run.folder.parent for run in runs):
        own = [run for run in runs if run.folder.parent == folder]
        if table == "figure3":
            first = own[:len(TABLES[table])]
            flags = ["--checkpoint-path", *(run.folder / "checkpoint.pth" for run in first),
                     "--row-label", *("MetaSemi" if run.row == "both" else "Baseline" for run in first)]
        else:
            flags = ["--curves", *(run.folder for run in own)]
        if subprocess.run([sys.executable, HERE / "plot_features.py", *flags, "--save-path", folder]).returncode:
            failures.append(f"{folder}: plot_features.py failed")
    return failures


# Collecting

def write_report():
    """Brings runs.csv and the reports up to date with the run folders; returns the table of all cells.

    Runs in runs.csv whose folder is not here, such as those of another machine, stay.
    """
    lines = {order(line): line for line in (*read_runs(), *read_runs(finished=True))}
    lines = [lines[key] for key in sorted(lines)]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    blocks = tables(lines)
    texts = {RUNS: text.getvalue(), **{path: filled(path, blocks) for path in REPORTS if path.exists()}}
    for path, text in texts.items():                # nothing is written before all has been read
        write_text(path, text)
    return blocks["cells"]


def read_runs(finished=False):
    """Lines of runs.csv, or of the finished run folders."""
    if not finished:
        return read_table() if RUNS.exists() else []
    runs = []
    for path in FOLDERS.glob("*/*/results.json"):
        match = re.fullmatch(r"(.+)-([0-9]+(?:\.[0-9]+)?)/(.+)-([0-9]+)", str(path.parent.relative_to(FOLDERS)))
        if match and match[1] in CELLS and match[3] in ROWS:
            run = Run(match[1], match[3], int(match[4]), float(match[2]))
            if run.folder == path.parent:
                runs.append(run.line())
    return runs


def read_table():
    """The lines of runs.csv; raises UsageError, which names the line, for one that is no run, or a run that is there twice."""
    lines = {}
    try:
        table = csv.DictReader(io.StringIO(RUNS.read_text(encoding="utf-8")), strict=True)
        if missing := {"cell", "row", *REQUIRED} - {*(table.fieldnames or ())}:
            raise UsageError(f"{RUNS} has no columns {', '.join(sorted(missing))}: restore it")
        for line in table:
            fault = fault_of(line)
            if not fault and order(line) in lines:
                fault = "the same run is in a line before it"
            if fault:
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
    """Sorts runs as the tables have them; the same for two lines of the same run."""
    return list(CELLS).index(line["cell"]), -float(line["scale"]), list(ROWS).index(line["row"]), int(line["seed"])


if __name__ == "__main__":
    sys.exit(main())
