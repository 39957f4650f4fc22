"""The paper's tables and figures: makes the runs that are missing, and shows what has come out.

    python3 reproduce.py main --seeds 3                             # MetaSemi and fully supervised
    python3 reproduce.py ablation --dataset cifar10 --gpus 0 1      # its rows, on two GPUs
    python3 reproduce.py ablation --dataset digits --seeds 5        # on a CPU
    python3 reproduce.py ablation --flags="--dataset folder --data-path photos --num-label 400 --total-steps 20000"
    python3 reproduce.py figure3 --dataset svhn
    python3 reproduce.py curves --dataset cifar10 --scale 0.05
    python3 reproduce.py differences --dataset cifar10-jpeg-500-long       # over the steps, of the runs that are published
    python3 reproduce.py table results/a results/b --format latex          # of any run folders
    python3 reproduce.py main --dataset imagenet --dry-run          # the commands and their cost

Each run is one command of train_meta.py with a folder of its own under results/reproduce, which git ignores.  A run that is
finished is not repeated, one that was begun is continued.  Nothing else is changed, but images/ by `differences`, and by
--publish the files in results/, the tables that are made of them, and the lists of labeled images in splits/.
"""
import hashlib
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

import plot_features
from reproduction.cells import ABLATION, CELLS, ROWS, own_flags, training_flop
from utils.cli import Parser, escape_output, number, path, refuse_without_effect
from utils.errors import UsageError, one_line_errors, printable
from utils.files import lock
from utils.interrupt import Interrupt

with one_line_errors("reproduce.py"):       # joblib or scipy may be missing
    import joblib

    from reproduction.published import EVALUATIONS, RUNS, order, publish, read_lines
    from reproduction.report import tables
    from reproduction.run import Run
    from reproduction.sweep import FORMS, sweep_table

PROG, HERE = "reproduce.py", Path(__file__).parent
TABLES = {"main": ("both", "supervised"), "ablation": (*ABLATION, "beta-0"), "figure3": ("neither", "both"), "curves": ABLATION,
          "differences": (), "table": ()}
RUNNING = ("rows", "seeds", "first_seed", "gpus", "jobs", "dry_run", "publish", "flags")
WITHOUT_EFFECT = {      # table -> flags that it does not use
    "main": ("flags", "format"), "ablation": ("format",), "figure3": ("rows", "publish", "flags", "format"),
    "curves": ("publish", "flags", "format"),
    "differences": (*RUNNING, "format"), "table": (*RUNNING, "dataset", "scale")}
RATE, RATE_NAME = 0.35 * 790e12, "35 % of a large bfloat16 matrix product on one H200: an assumption, not a measurement"


def main(argv=None):
    escape_output()
    args = parse(argv)
    with Interrupt() as interrupt, one_line_errors(PROG):
        interrupt.listen()
        return make(args)


def make(args):
    """Makes what a command line asks for; returns the exit code."""
    if args.table == "table":
        print(sweep_table(args.runs, FORMS[args.format]))
        return 0
    if args.table == "differences":
        from reproduction.figures import draw_differences  # matplotlib takes a second to load

        evaluations = read_lines(EVALUATIONS)
        for cell in args.dataset:
            of_cell = [line for line in evaluations if line["cell"] == cell and float(line["scale"]) == args.scale]
            print(*draw_differences(of_cell, Path("images", f"differences-{cell}.png")))
        return 0
    runs = planned_runs(args)
    if args.dry_run:
        commands = [shlex.join(["train_meta.py", *run.command()]) for run in runs]
        print(*(f"# {line}" for line in costs(runs)), *(f"python3 {command}" for command in commands), sep="\n")
        return 0
    with lock(RUNS.parent):             # against a second program that starts the same runs
        print(*costs(runs), sep="\n")
        for run in runs:
            print(f"{run.folder}: {'finished' if run.results() else 'begun' if run.folder.exists() else 'to do'}", flush=True)
        failed = run_all([run for run in runs if not run.results()], args.gpus, args.jobs)
        if args.flags is not None and not failed:
            print("\n" + sweep_table([run.folder for run in runs], FORMS["markdown"]))
        elif args.table in ("main", "ablation") and args.flags is None:
            report([run for run in runs if run not in failed], args.publish)
        elif not failed:
            draw(args.table, runs)
    return 1 if failed else 0


def parse(argv):
    parser = Parser(prog=PROG, description=__doc__)
    parser.add_argument("table", choices=TABLES, help="; ".join(f"{name}: {' '.join(rows)}" for name, rows in TABLES.items()))
    parser.add_argument("runs", nargs="*", type=path, metavar="RUN", help="table: folders of finished runs")
    parser.add_argument("--dataset", nargs="+", choices=CELLS, default=["svhn", "cifar10", "cifar100"],
                        help="cells of the table (default: svhn cifar10 cifar100)")
    parser.add_argument("--flags", metavar="TEXT",
                        help="ablation: flags of train_meta.py in the place of a cell: --flags=\"--data-path photos ...\"")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="main, ablation and curves: these rows instead")
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
                        help="main and ablation: write these runs to results/, REPRODUCTION.md, README.md and splits/")
    parser.add_argument("--dry-run", action="store_true", help="print the command of each run and the cost, and do nothing")
    parser.add_argument("--format", choices=FORMS, default="markdown", help="table: how it is written (default: markdown)")
    args = parser.parse_intermixed_args(argv)
    args.dataset = list(dict.fromkeys(args.dataset))
    refuse_without_effect(parser, args, args.table, WITHOUT_EFFECT[args.table])
    if args.gpus:
        refuse_without_effect(parser, args, "--gpus", ("jobs",))
    if args.flags is not None:
        refuse_without_effect(parser, args, "--flags", ("dataset", "scale", "publish"))
        if "supervised" in (args.rows or ()):
            parser.error("argument --rows: supervised: with --flags give --num-label for all images, and the row neither")
    if bool(args.runs) != (args.table == "table"):
        parser.error("argument RUN: folders of runs belong to `table`, and it needs them")
    args.rows = list(dict.fromkeys(args.rows or TABLES[args.table]))
    return args


def planned_runs(args):
    """Returns the runs of a command, seed by seed."""
    if args.flags is not None:
        own = own_flags(args.flags)
        name = f"{own.get('dataset', 'cifar10')}-{hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()[:8]}"
        return [Run(name, row, (args.first_seed or 1) + i, 1.0, own) for i in range(args.seeds) for row in args.rows]
    return [Run(cell, row, (args.first_seed or CELLS[cell].seed) + i, args.scale)
            for cell in args.dataset for i in range(args.seeds) for row in args.rows]


def costs(runs):
    """Yields a line of the FLOP and hours of each cell, at the speed of the published runs of its network, or at RATE."""
    speeds = {}                         # network -> FLOP per second of its runs
    for line in read_lines(RUNS):
        flop = training_flop(line["cell"], line["row"], float(line["scale"]))
        speeds.setdefault(CELLS[line["cell"]].arch, []).append(flop / max(1.0, float(line["seconds"])))
    for cell in dict.fromkeys(run.cell for run in runs if run.own is None):
        own = [run for run in runs if run.cell == cell]
        found, flop = speeds.get(CELLS[cell].arch), sum(training_flop(run.cell, run.row, run.scale) for run in own)
        rate, name = (statistics.median(found), f"the median of {len(found)} runs of {CELLS[cell].arch}") if found else (
            RATE, RATE_NAME)
        yield f"{cell}: {len(own)} runs, {flop:.2g} FLOP, {flop / rate / 3600:.2g} hours one after the other at {rate:.2g} " \
              f"FLOP/s ({name})"


def run_all(runs, gpus, jobs):
    """Makes runs, one at a time on each GPU or `jobs` at a time on the CPU; prints why some fail, and returns these.

    One run at a time prints for itself; of several only the end is told.  If a signal ends this program, each run in hand gets
    SIGTERM, on which it saves, and is waited for.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, joblib.cpu_count() // jobs))
    free = [{"CUDA_VISIBLE_DEVICES": str(gpu)} for gpu in gpus] if gpus else [{"OMP_NUM_THREADS": threads}] * jobs
    alone, running, failed = len(free) == 1, {}, []
    waiting = [(run, run.command()) for run in runs]        # what is damaged or missing is found before any run starts
    for run in runs:
        run.check_start()
    bar = tqdm(total=len(runs), unit="run", disable=alone or None, dynamic_ncols=True)
    try:
        while waiting or running:
            while waiting and free:
                (run, flags), environment = waiting.pop(0), free.pop()
                error = None if alone else tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
                # In a session of its own Ctrl-C reaches a run as one SIGTERM from here.
                process = subprocess.Popen([sys.executable, HERE / "train_meta.py", *flags], env={**os.environ, **environment},
                                           stdout=None if alone else subprocess.DEVNULL, stderr=error, start_new_session=True)
                running[run] = process, environment, error
            for run, (process, environment, error) in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    free.append(environment)
                    if not ended_well(run, process.returncode, error):
                        failed.append(run)
                    bar.update()
            bar.refresh()
            time.sleep(0.2)
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()
        bar.close()
    return failed


def ended_well(run, code, error):
    """Prints the result of a run that has ended, or what went wrong; returns whether it is finished."""
    try:
        if code:
            if error:
                error.seek(0)
            raise UsageError(f"{run.folder}: exit code {code}" + (f": {error.read().strip()}" if error else ""))
        results, _ = run.finished()
    except UsageError as fault:
        print(f"{PROG}: {printable(fault)}", file=sys.stderr, flush=True)
        return False
    tqdm.write(f"{run.folder}: test error {results['error_rate']['last']:.2f} %, {results['seconds']:.0f} s")
    return True


def report(runs, publishing):
    """Prints the tables of finished runs, and publishes them if that is asked for."""
    if not runs:
        return
    blocks = tables(sorted((run.lines()[0] for run in runs), key=order))
    for cell in dict.fromkeys(run.cell for run in runs):
        print(f"\n{CELLS[cell].title}: test error in percent\n\n{blocks[cell]}\n\n"
              f"Differences of test errors on the same seeds, in points\n\n{blocks[f'paired-{cell}']}\n")
    if publishing:
        print("published in", *publish(runs))
    else:
        print("not published: --publish writes these runs to results/, REPRODUCTION.md, README.md and splits/")


def draw(table, runs):
    """Draws Figure 3 of the first seed, or the curves of all seeds, for each cell."""
    for folder in dict.fromkeys(run.folder.parent for run in runs):
        of_cell = [run.folder for run in runs if run.folder.parent == folder]
        flags = ["--curves", *of_cell] if table == "curves" else [
            "--checkpoint-path", *of_cell[:2], "--row-label", "Baseline", "MetaSemi"]       # the first seed's, neither and both
        plot_features.main([*map(str, flags), "--save-path", str(folder)])


if __name__ == "__main__":
    sys.exit(main())
