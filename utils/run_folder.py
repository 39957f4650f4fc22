"""The files of one run.  `metrics.jsonl` is the durable record; the TensorBoard events are a view of it."""
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from utils import checkpoint
from utils.cli import LAST, UsageError

ARGS, LOG, METRICS, RESULTS = "args.json", "log.txt", "metrics.jsonl", "results.json"
INDICES, SPLIT, LOCK = "label_indices.txt", "split.json", ".lock"
OURS = (ARGS, LOG, METRICS, RESULTS, INDICES, SPLIT, checkpoint.NAME, checkpoint.PREVIOUS, checkpoint.BEST)


def prepare(path, resume, overwrite):
    """What a command may continue, before anything is written: the locked folder and the checkpoint, or None for each.

    resume: None, cli.LAST or the path of a checkpoint.  Raises UsageError for a folder that must not be touched
    and CheckpointError for a checkpoint that cannot be read.
    """
    named = Path(resume) if resume not in (None, LAST) else None
    own = resume == LAST or named is not None and named.parent.resolve() == path.resolve()
    if path.exists() and not path.is_dir():
        raise UsageError(f"argument --save-path: {path} is a file: give a folder")
    if own and overwrite:
        raise UsageError("argument --overwrite: it removes what --resume continues: give one of them")
    found = any((path / name).exists() for name in OURS)
    if found and not own and not overwrite:
        raise UsageError(f"argument --save-path: {path} holds a run: "
                         "add --resume to continue it or --overwrite to start afresh")
    folder = RunFolder(path, overwrite) if found else None
    if named is not None:
        return folder, checkpoint.load(named)
    return folder, checkpoint.load_last(path, warn=folder.say) if found and own else None


# Flags that may differ between the parts of a resumed run.  All others define the experiment.
FREE = ("data_path", "device", "num_workers", "precision", "print_freq", "test_freq", "total_steps")


def experiment(args):
    """The flags as plain types, without those that only say where and how a run is kept."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
            if key not in ("save_path", "resume", "overwrite")}


def check_same_experiment(args, saved, step):
    """Refuses to continue a run with a flag that would make it another experiment; saved: `experiment` of the run."""
    for key, value in experiment(args).items():
        then = saved.get(key)
        if key == "milestones":         # those still to come may move
            value, then = ([m for m in steps if m < step] for steps in (value, then))
        if key not in FREE and value != then:
            raise UsageError(f"argument --{key.replace('_', '-')}: {value} now, {then} in the run that --resume "
                             f"continues: give {then}, or another --save-path without --resume")


class RunFolder:
    """One run's folder, locked against a second process until `close`; with `overwrite`, `start` clears it."""

    def __init__(self, path, overwrite=False):
        self.path, self.overwrite = Path(path), overwrite
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / LOCK, "a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            raise UsageError(f"{self.path} is in use by process {self.lock.read().strip() or 'unknown'}") from None
        self.lock.truncate(0)
        self.lock.write(str(os.getpid()))
        self.lock.flush()
        self.log_file = self.metrics_file = self.events = None
        self.echo = True

    def start(self, flags, sessions, labeled, validation, labels_sha256, keep):
        """Writes what the run is and opens its records, with everything after step `keep` taken out of them.

        A run from step 0 first removes the files of an older one, by name; nothing else in the folder is touched.
        """
        from tensorboardX import SummaryWriter

        indices = "".join(f"{index}\n" for index in labeled)
        clear = keep == 0 or self.overwrite
        if not clear and (self.path / INDICES).exists() and (self.path / INDICES).read_text() != indices:
            raise UsageError(f"{self.path / INDICES} is not the split that the checkpoint was trained on: restore it "
                             "or remove it, and it is written again")
        for leftover in self.path.glob("*" + checkpoint.TEMPORARY):
            leftover.unlink()
        if clear:
            for name in OURS:
                (self.path / name).unlink(missing_ok=True)
            for events in self.path.glob("events.out.tfevents.*"):
                events.unlink()
        (self.path / RESULTS).unlink(missing_ok=True)
        metrics = self.path / METRICS
        if metrics.exists():
            write(metrics, "".join(line for line in whole_lines(metrics) if json.loads(line)["step"] <= keep))
        write(self.path / INDICES, indices)
        self.write_json(SPLIT, {"sha256": hashlib.sha256(indices.encode()).hexdigest(), "dataset": flags["dataset"],
                                "labels_sha256": labels_sha256, "num_label": len(labeled), "seed": flags["seed"],
                                "validation": validation.tolist()})
        self.write_json(ARGS, {"args": flags, "sessions": sessions})
        self.log_file = open(self.path / LOG, "a", encoding="utf-8", buffering=1)
        self.metrics_file = open(metrics, "a", encoding="utf-8")
        self.events = SummaryWriter(str(self.path), purge_step=keep + 1 if keep else None)

    def say(self, message):
        """One line to log.txt and to standard output, above the progress bar if there is one."""
        if self.log_file:
            self.log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n")
        if self.echo:
            try:
                tqdm.write(message)
                sys.stdout.flush()
            except OSError:             # nobody reads any more; the run goes on
                self.echo = False

    def record(self, step, scalars):
        """tag -> value at a step, to metrics.jsonl and TensorBoard."""
        self.metrics_file.write(json.dumps({"step": step, **scalars}) + "\n")
        self.metrics_file.flush()
        for tag, value in scalars.items():
            self.events.add_scalar(tag, value, step)

    def log(self, step, total_steps, alpha, means, rate, images_per_step):
        """A line of training means; rate in steps per second."""
        self.record(step, {f"train/{name}": value for name, value in means.items()} | {"train/lr": alpha})
        values = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.say(f"step {step}/{total_steps}  {values}  lr {alpha:.4g}  {rate * images_per_step:.0f} images/s  "
                 f"{duration((total_steps - step) / rate)} left")

    def finish(self, steps, seconds, rates, evaluations, flags, sessions):
        """Writes results.json and says the error rates under every selection rule."""
        self.write_json(RESULTS, {"error_rate": rates, "evaluations": evaluations, "steps": steps,
                                  "seconds": round(seconds, 1), "args": flags, "sessions": sessions})
        validated = rates["best_validation"]
        self.say(f"finished {steps} steps in {duration(seconds)}: test error {rates['last']:.2f} % (last), "
                 f"{rates['median_last_20']:.2f} % (median of the last 20 evaluations), "
                 + (f"{validated:.2f} % (best on validation), " if validated is not None else "")
                 + f"{rates['best_test']:.2f} % (lowest, so selected on the test set)")
        self.close()

    def has_results(self):
        return (self.path / RESULTS).exists()

    def progress(self, start, total_steps):
        """A progress bar on a terminal, nothing elsewhere."""
        return tqdm(initial=start, total=total_steps, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def write_json(self, name, content):
        write(self.path / name, json.dumps(content, indent=2) + "\n")

    def close(self):
        for file in (self.events, self.metrics_file, self.log_file, self.lock):
            if file:
                file.close()


def write(path, text):
    """Replaces a text file in one step."""
    temporary = path.with_name(path.name + checkpoint.TEMPORARY)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def whole_lines(path):
    """The lines of a file that were written to their end."""
    with open(path, encoding="utf-8") as file:
        return [line for line in file if line.endswith("\n")]


def duration(seconds):
    """For example "2 h 05 min", "3 min 20 s", "7 s"."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


def git_commit():
    """The commit of this checkout, with "-dirty" if it was changed; None outside a checkout."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], check=True,
                              capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
