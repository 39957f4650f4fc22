"""The paper's tables and figures: makes the runs that are missing, and shows what has come out.

    python3 reproduce.py main --seeds 3                             # MetaSemi and fully supervised
    python3 reproduce.py ablation --dataset cifar10 --gpus 0 1      # its rows, on two GPUs
    python3 reproduce.py ablation --dataset digits --seeds 5        # on a CPU
    python3 reproduce.py figure3 --dataset svhn
    python3 reproduce.py curves --dataset cifar10 --scale 0.05
    python3 reproduce.py imagenet                                   # only prints the plan and its cost

Each run is one command of train_meta.py with a folder of its own under results/reproduce; --dry-run prints them.  A run that
is finished is not repeated, one that was begun is continued.  Everything is written to results/, which git ignores, and nothing
else is changed.  With --publish, `main` and `ablation` also write their runs to results/runs.csv, from it REPRODUCTION.md and
the tables of README.md, and their labeled images to splits/.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))        # python -P leaves it out

from utils.interrupt import end_at_once

if __name__ == "__main__":
    end_at_once("reproduce.py")      # first of all: the other imports take a while

import ctypes
import fcntl
import shlex
import signal
import statistics
import subprocess
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from reproduction.cells import ABLATION, CELLS, ROWS, training_flop
from reproduction.published import RUNS, check_split, order, publish
from reproduction.report import tables
from reproduction.run import Run, finished_runs
from utils.cli import Parser, UsageError, fail, number, open_standard_streams, refuse_idle
from utils.failure import one_line_errors
from utils.files import LOCK, open_lock, printable
from utils.run_folder import RunFolder

PROG = "reproduce.py"
HERE = Path(__file__).parent
TABLES = {"main": ("both", "supervised"), "ablation": (*ABLATION, "beta-0"), "figure3": ("neither", "both"), "curves": ABLATION,
          "imagenet": ("neither", "both", "supervised")}
TORCHRUN, RATE = "torchrun --nproc-per-node=8", 0.35 * 790e12     # 35 % of a bfloat16 matrix product on an H200
CGROUP = Path("/sys/fs/cgroup")
LIBC = ctypes.CDLL(None)


def main(argv=None):
    open_standard_streams()
    args = parse(argv)
    end_at_once(PROG)                                       # and the runs with this program, see `end_with_parent`
    with one_line_errors(PROG, fail):
        if args.table == "imagenet":
            print_imagenet(args.seeds, args.scale)
            return 0
        runs = [Run(cell, row, (args.first_seed or CELLS[cell].seed) + i, args.scale)
                for cell in args.dataset for i in range(args.seeds) for row in args.rows]
        if args.dry_run:
            for run in runs:
                print(shlex.join(["python3", "train_meta.py", *run.command()]))
            return 0
        results = RunFolder(RUNS.parent)
        results.lock()                                      # against a second program that starts the same runs
        for run in runs:
            check_split(run)
        print_plan(runs)
        failed = run_all([run for run in runs if not run.results()], args.gpus, args.jobs)
        if args.table in ("main", "ablation"):
            report([run for run in runs if run not in failed], args.publish)
        elif not failed:
            failed = draw(args.table, runs)
        results.close()
        return 1 if failed else 0


def parse(argv):
    parser = Parser(prog=PROG, description=__doc__)
    parser.add_argument("table", choices=TABLES, help="; ".join(f"{name}: {' '.join(rows)}" for name, rows in TABLES.items()))
    parser.add_argument("--dataset", nargs="+", choices=CELLS, default=["svhn", "cifar10", "cifar100"],
                        help="cells of the table (default: svhn cifar10 cifar100)")
    parser.add_argument("--rows", nargs="+", choices=ROWS,
                        help="main, ablation and curves: these rows instead")
    parser.add_argument("--seeds", type=number(int, low=1, high=1000), default=1, metavar="N",
                        help="runs of each row, with seeds one apart (default: 1)")
    parser.add_argument("--first-seed", type=number(int, low=1, high=2 ** 62), metavar="N",
                        help="the first of these seeds, to add to those that are published (default: that of the cell)")
    parser.add_argument("--scale", type=number(float, low=1e-4, high=1), default=1.0, metavar="X",
                        help="multiplies the steps, milestones, warm-up and evaluation interval (default: 1)")
    parser.add_argument("--gpus", nargs="+", type=number(int, low=0, high=1023), metavar="N",
                        help="GPUs to use, one run on each at a time")
    parser.add_argument("--jobs", type=number(int, low=1, high=1024), default=1, metavar="N",
                        help="without --gpus: runs at a time, which divide the CPUs that are available to this program among "
                             "them; OMP_NUM_THREADS in the environment sets the threads of each instead (default: 1)")
    parser.add_argument("--publish", action="store_true",
                        help="main and ablation: write the runs of this command to results/runs.csv, REPRODUCTION.md, "
                             "README.md and splits/; without it no file under version control changes")
    parser.add_argument("--dry-run", action="store_true", help="print the command of each run, and do nothing")
    args = parser.parse_args(argv)
    args.dataset = list(dict.fromkeys(args.dataset))
    for applies, choice, names in (
            (args.gpus, "--gpus", ("jobs",)),
            (args.table == "imagenet", "the table imagenet, which runs nothing", ("dataset", "rows", "gpus", "jobs")),
            (args.table == "figure3", "figure3", ("rows",)),
            (args.table not in ("main", "ablation"), args.table, ("publish",))):
        if applies:
            refuse_idle(parser, args, choice, names)
    args.rows = list(dict.fromkeys(args.rows or TABLES[args.table]))
    return args


# Before the runs

def print_imagenet(seeds, scale):
    """The commands of the ImageNet table, one run on all GPUs at a time, and hours on paper: none has been measured."""
    print("| row | FLOP | hours on 1 H200 | on 8, without loss between them |\n|---|---|---|---|")
    for row in TABLES["imagenet"]:
        flop = training_flop("imagenet", row, scale)
        print(f"| {ROWS[row].title} | {flop:.2g} | {flop / RATE / 3600:.1f} | {flop / RATE / 3600 / 8:.1f} |")
    print(f"\nat {RATE / 1e12:.0f} TFLOP/s a GPU, 35 % of a large bfloat16 matrix product: an assumption, not a measurement\n")
    for row in TABLES["imagenet"]:
        for seed in range(CELLS["imagenet"].seed, CELLS["imagenet"].seed + seeds):
            flags = Run("imagenet", row, seed, scale).command()
            print(f"{TORCHRUN} train_meta.py {shlex.join(flags)} --precision bfloat16")


def print_plan(runs):
    """What there is to do, with hours by the speed of the finished runs of the same network."""
    speeds = {}
    for run in finished_runs():
        speed = training_flop(run.cell, run.row, run.scale) / max(1.0, run.results()["seconds"])
        speeds.setdefault(CELLS[run.cell].arch, []).append(speed)
    print("| run | state | FLOP | hours |\n|---|---|---|---|")
    for run in runs:
        state = "finished" if run.results() else "begun" if run.folder.exists() else "to do"
        flop, speed = training_flop(run.cell, run.row, run.scale), speeds.get(CELLS[run.cell].arch)
        hours = f"{flop / statistics.median(speed) / 3600:.2g}" if speed else "unknown until one such run is finished"
        print(f"| {run.folder} | {state} | {flop:.2g} | {hours} |", flush=True)


# Running

def run_all(runs, gpus, jobs):
    """Makes runs, one at a time on each GPU or `jobs` at a time on the CPU; prints why some fail, and returns these."""
    environments = deque([{"CUDA_VISIBLE_DEVICES": str(gpu)} for gpu in gpus] if gpus else [cpu_environment(jobs)] * jobs)
    running, failed = {}, []
    commands = [(run, run.command()) for run in runs]       # here, so that a damaged args.json is found before any run starts

    def start(run, flags):
        environment = environments.popleft()                # there is one for each thread of the pool
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            with open_lock(run.folder / LOCK) as lock:     # a run of a program that was killed is still saving
                fcntl.flock(lock, fcntl.LOCK_EX)
            running[run] = Progress(run)
            return subprocess.run([sys.executable, HERE / "train_meta.py", *flags], env={**os.environ, **environment},
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
                                  preexec_fn=end_with_parent, start_new_session=True)
        finally:
            running.pop(run, None)
            environments.append(environment)

    with ThreadPoolExecutor(len(environments)) as pool:
        waiting = {pool.submit(start, run, flags): run for run, flags in commands}
        try:
            while waiting:
                for future in wait(waiting, timeout=1, return_when=FIRST_COMPLETED).done:
                    run = waiting.pop(future)
                    if not ended_well(run, future.result()):
                        failed.append(run)
                for progress in list(running.values()):
                    progress.print_if_due()
        finally:
            pool.shutdown(cancel_futures=True)
    return failed


def ended_well(run, process):
    """Prints the result of a run whose process has ended, or what went wrong; returns whether the run is finished."""
    if process.returncode:
        print_error(f"{run.folder}: exit code {process.returncode}: {process.stderr.strip()}")
        return False
    try:
        line = run.line()
    except UsageError as error:
        print_error(error)
        return False
    print(f"{run.folder}: test error {float(line['last']):.2f} %, {line['seconds']} s", flush=True)
    return True


class Progress:
    """What is printed of a run while it goes on: a line every 5 seconds at first, and ever more rarely, until it is one every
    10 minutes."""

    def __init__(self, run):
        self.run, self.started, self.printed = run, time.monotonic(), None
        self.due = self.started + 5

    def print_if_due(self):
        now = time.monotonic()
        if now >= self.due:
            line = f"{self.run.folder}: {self.run.progress() or 'begins'}"
            if line != self.printed:
                print(line, flush=True)
            self.due, self.printed = now + min(600, max(5, (now - self.started) / 4)), line


def cpu_environment(jobs):
    """Environment variables that divide the CPUs among `jobs` runs, unless the user has set the threads of a run."""
    return {} if os.environ.get("OMP_NUM_THREADS") else {"OMP_NUM_THREADS": str(max(1, available_cpus() // jobs))}


def available_cpus():
    """How many CPUs this process may use: by its affinity, and by the quota of the container that it runs in."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):          # cgroup version 2, version 1
        with suppress(OSError, ValueError):                 # not this version; no quota, which version 2 calls "max"
            quota, period = map(int, " ".join((CGROUP / name).read_text(encoding="utf-8") for name in names).split())
            if quota > 0:                                   # -1 is none
                count = min(count, max(1, quota // period))
    return count


def end_with_parent():
    """In a child before it starts: SIGTERM, on which it saves, as soon as this program ends, however it does."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGTERM)                       # PR_SET_PDEATHSIG


# After the runs

def report(runs, publishing):
    """Prints the tables of finished runs, and publishes them if that is asked for."""
    if not runs:
        return
    blocks = tables(sorted((run.line() for run in runs), key=order))
    for cell in dict.fromkeys(run.cell for run in runs):
        print(f"\n{CELLS[cell].title}: test error in percent\n\n{blocks[cell]}")
    print(f"\nDifferences of test errors on the same seeds, in points\n\n{blocks['paired']}\n")
    if publishing:
        print("published in", *publish(runs))
    else:
        print("not published: --publish writes these runs to results/runs.csv, REPRODUCTION.md, README.md and splits/")


def draw(table, runs):
    """Draws Figure 3 of the first seed, or the curves of all seeds, for each cell.  Returns the folders where that failed."""
    failed = []
    for folder in dict.fromkeys(run.folder.parent for run in runs):
        of_cell = [run for run in runs if run.folder.parent == folder]
        if table == "figure3":
            first_seed = of_cell[:len(TABLES[table])]
            flags = ["--checkpoint-path", *(run.folder / "checkpoint.pth" for run in first_seed),
                     "--row-label", *("MetaSemi" if run.row == "both" else "Baseline" for run in first_seed)]
        else:
            flags = ["--curves", *(run.folder for run in of_cell)]
        if subprocess.run([sys.executable, HERE / "plot_features.py", *flags, "--save-path", folder]).returncode:
            print_error(f"{folder}: plot_features.py failed")
            failed.append(folder)
    return failed


def print_error(message):
    print(f"{PROG}: {printable(message)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
