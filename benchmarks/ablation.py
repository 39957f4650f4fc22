"""The four rows of the paper's ablation on a data set at hand: runs what is missing, prints a table.

    python3 benchmarks/ablation.py digits --seeds 5
    python3 benchmarks/ablation.py cifar10-jpeg --seeds 2 --data-path data/cifar10-images

A second call repeats nothing that is finished and continues what was begun.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = {
    "neither": ("supervised baseline", ["--no-meta"]),
    "meta": ("meta only", []),
    "mix-up": ("mix-up only", ["--no-meta", "--mix-up"]),
    "both": ("MetaSemi", ["--mix-up"]),
}
SETTINGS = {
    "digits": "--dataset digits --num-label 50 -a convsmall --batch-size 64 --total-steps 800 --warmup 80 "
              "--milestones 600,700 --print-freq 100 --test-freq 100",
    "cifar10-jpeg": "--dataset folder --flip --num-label 4000 -a convsmall --batch-size 64 --total-steps 5000 --warmup 200 "
                    "--milestones 3750,4375 --print-freq 100 --test-freq 250",
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=1, help="seeds 1 to N (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, which share the cores (default: 1)")
    parser.add_argument("--data-path", default="data")
    parser.add_argument("--save-path", type=Path, help="one folder a run below this one (default: results/SETTING)")
    args = parser.parse_args(argv)
    root = args.save_path or Path("results", args.setting)
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))

    def run(row, seed):
        folder = root / f"{row}-{seed}"
        command = [sys.executable, ROOT / "train_meta.py", *SETTINGS[args.setting].split(), *ROWS[row][1],
                   "--seed", str(seed), "--data-path", args.data_path, "--save-path", folder, "--resume"]
        shown = None if args.jobs == 1 else subprocess.DEVNULL      # the lines are in log.txt in either case
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads}, stdout=shown)
        if done.returncode:
            raise SystemExit(f"{folder}: exit code {done.returncode}")
        result = json.loads((folder / "results.json").read_text())
        print(f"{ROWS[row][0]}, seed {seed}: test error {result['error_rate']['last']:.2f} %, "
              f"{result['seconds']:.0f} s, {folder}", flush=True)
        return row, result

    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda task: run(*task), [(row, seed) for seed in range(1, args.seeds + 1)
                                                          for row in args.rows]))
    print(f"\n{SETTINGS[args.setting]}\n")
    print(table(args.rows, results))


def table(rows, results):
    """Markdown: test error in percent, mean and standard deviation over the seeds, for three selection rules."""
    lines = ["| row | n | last | median of the last 20 | lowest (selected on the test set) | seconds a run |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        own = [result for name, result in results if name == row]
        rules = [[result["error_rate"][rule] for result in own] for rule in ("last", "median_last_20", "best_test")]
        seconds = statistics.mean(result["seconds"] for result in own)
        lines.append(f"| {ROWS[row][0]} | {len(own)} | {' | '.join(map(spread, rules))} | {seconds:.0f} |")
    return "\n".join(lines)


def spread(values):
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
