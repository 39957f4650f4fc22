"""The files of one run.  `metrics.jsonl` is the durable record; the TensorBoard events are a view of it."""
import fcntl
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from utils.cli import LAST, UsageError
from utils.files import BEST, CHECKPOINT, PREVIOUS, TEMPORARY, Appender, is_at, link, open_lock, printable, write_text

ARGS, LOG, METRICS, RESULTS = "args.json", "log.txt", "metrics.jsonl", "results.json"
INDICES, SPLIT, LOCK = "label_indices.txt", "split.json", ".lock"
EVENTS = ".metasemi"        # how the names of our TensorBoard files end: other programs keep theirs in the same folder
OURS = (ARGS, LOG, METRICS, RESULTS, INDICES, SPLIT, CHECKPOINT, PREVIOUS, BEST)


def check_paths(path, resume, overwrite):
    """Raises UsageError for a run folder that a command must not touch, or a checkpoint that is missing; needs no torch.

    resume: None, cli.LAST or the path of a checkpoint.
    """
    if resume not in (None, LAST) and not os.path.exists(resume):
        raise UsageError(f"argument --resume: {resume}: no such checkpoint (a missing file never means a fresh start)")
    if path.exists() and not path.is_dir():
        raise UsageError(f"argument --save-path: {path} is a file: give a folder")
    if continues(path, resume):
        if overwrite:
            raise UsageError("argument --overwrite: it removes what --resume continues: give one of them")
        if has_lost_checkpoints(path):
            best = f", give --resume {path / BEST}," if (path / BEST).exists() else ""
            raise UsageError(f"argument --resume: {path} holds a run that has lost its {CHECKPOINT} and {PREVIOUS}: restore one"
                             f"{best} or add --overwrite instead to start afresh")
    elif holds_run(path) and not overwrite:
        raise UsageError(f"argument --save-path: {path} holds a run: "
                         "add --resume to continue it or --overwrite to start afresh")


def prepare(path, resume, overwrite):
    """What a command that `check_paths` let pass may continue: (folder, saved, source).

    folder is the locked run folder, saved the state of a run and source the file it came from and why that one; None
    for what there is not.  Writes nothing but the lock.  Raises UsageError for a folder in use and CheckpointError
    for a checkpoint that cannot be read.
    """
    from utils import checkpoint

    folder = RunFolder(path, overwrite) if holds_run(path) else None
    if resume not in (None, LAST):
        return folder, checkpoint.load(resume), f"{resume}, as --resume says"
    last = checkpoint.load_last(path, warn=folder.say) if folder and resume else None
    if last is None:
        return folder, None, None
    saved, folder.source, why = last
    return folder, saved, why


def holds_run(path):
    return any((path / name).exists() for name in OURS)


def has_lost_checkpoints(path):
    """Whether the run in a folder has no checkpoint, but was saved: it has an end, a best step, or a second evaluation."""
    if (path / CHECKPOINT).exists() or (path / PREVIOUS).exists():
        return False
    if (path / RESULTS).exists() or (path / BEST).exists():
        return True
    return (path / METRICS).is_file() and (path / METRICS).read_bytes().count(b'"test/accuracy"') > 1


def continues(path, resume):
    """Whether --resume means the run in the folder itself."""
    return resume == LAST or resume is not None and Path(resume).parent.resolve() == path.resolve()


# Flags that may differ between the parts of a resumed run.  All others define the experiment.
FREE = ("compile", "data_path", "device", "num_workers", "precision", "print_freq", "skip_corrupt", "test_freq", "total_steps")
OLDER = {"schedule": "step", "sync_bn": False}          # what runs did that are older than the flag


def experiment(args):
    """The flags as plain types, without those that only say where and how a run is kept."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
            if key not in ("save_path", "resume", "overwrite", "evaluate", "predictions")}


def shared(args):
    """What the processes of a run must hold in common before any data are loaded; flags as in `experiment`, and versions."""
    local = ("data_path", "num_workers", "split")       # a machine's own; what lies there is compared once it is loaded
    return {**{key: value for key, value in experiment(args).items() if key not in local},
            **{package: version(package) for package in ("torch", "torchvision", "numpy", "pillow")}}


def differing(now, then):
    """Names of what is different in two mappings, of what both hold."""
    return [name for name, value in now.items() if then.get(name, value) != value]


def trained_on(saved):
    """The digest of the data of a checkpoint; one of an earlier version has only a part of it."""
    return {"class names": "/".join(map(str, saved["class_names"])), "training labels": saved["labels_sha256"],
            **saved.get("data", {})}


def check_same_data(data, saved, source, path):
    """Refuses data at `path`, of a digest `data`, that are not those of the checkpoint `saved`; source: what to call it."""
    names = differing(data, trained_on(saved))
    if names:
        raise UsageError(f"argument --data-path: {path} is not what {source} was trained on: the {', '.join(names)} differ")


def check_same_experiment(args, saved, step):
    """Refuses to continue a run with a flag that would make it another experiment; saved: `experiment` of the run."""
    for key, value in experiment(args).items():
        then = saved.get(key, OLDER.get(key))
        if key == "milestones":         # those still to come may move
            value, then = ([m for m in steps if m < step] for steps in (value, then))
        if key == "arch_sha256" and value != then:
            raise UsageError(f"argument --arch: {args.arch} has changed since the run that --resume continues (SHA-256 {then} "
                             f"then, {value} now): restore the file, or give another --save-path without --resume")
        free = key in FREE and not (key == "total_steps" and args.schedule == "cosine")     # the cosine ends with the run
        if not free and value != then:
            raise UsageError(f"argument --{key.replace('_', '-')}: {value} now, {then} in the run that --resume "
                             f"continues: give {then}, or another --save-path without --resume")


class RunFolder:
    """One run's folder, locked against a second process until `close`; with `overwrite`, `start` clears it."""

    def __init__(self, path, overwrite=False, new=False):
        """new: raises UsageError if another process has left a run here by now."""
        self.path, self.overwrite = Path(path), overwrite
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / LOCK).is_symlink():
            raise UsageError(f"argument --save-path: {self.path / LOCK} is a symbolic link, which is not followed: remove it")
        self.lock = open_lock(self.path / LOCK)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.path} is in use by process {self.lock.read().strip() or 'unknown'}") from None
        if not is_at(self.lock, self.path / LOCK):
            raise UsageError(f"{self.path} was removed or replaced while this command began: give it again")
        if new and holds_run(self.path):
            raise UsageError(f"argument --save-path: {self.path} holds a run that began after this command: give another")
        self.lock.truncate(0)
        self.lock.write(str(os.getpid()))
        self.lock.flush()
        self.log_file = self.metrics = self.events = None
        self.source = self.bar = None
        self.failing = set()            # files that a full disk refuses at the moment

    def start(self, flags, sessions, labeled, validation, labels_sha256, keep):
        """Writes what the run is and opens its records, with everything after step `keep` taken out of them.

        A run from step 0 first removes the files of an older one, by name; no file of another program is touched.
        """
        clear = keep == 0 or self.overwrite
        if not clear and (self.path / INDICES).exists() and read_split(self.path / INDICES) != labeled.tolist():
            raise UsageError(f"{self.path / INDICES} is not the split that the checkpoint was trained on: restore it "
                             "or remove it, and it is written again")
        old = [RESULTS, *(name + TEMPORARY for name in OURS)]      # a kill may have left these half written
        if clear:
            old += [*OURS, *self.path.glob(f"events.out.tfevents.*{EVENTS}")]
        for name in old:
            (self.path / name).unlink(missing_ok=True)
        if self.source and self.source.name == PREVIOUS:    # so that the next save does not keep the damaged one
            link(self.source, self.path / CHECKPOINT)
        take_back(self.path / METRICS, keep, step_of_record)
        take_back(self.path / LOG, keep, step_of_line)
        indices = "".join(f"{index}\n" for index in labeled)
        write_text(self.path / INDICES, indices)
        self.write_json(SPLIT, {"sha256": hashlib.sha256(indices.encode()).hexdigest(), "dataset": flags["dataset"],
                                "labels_sha256": labels_sha256, "num_label": len(labeled), "seed": flags["seed"],
                                "validation": validation.tolist()})
        self.write_json(ARGS, {"args": flags, "sessions": sessions})
        self.log_file, self.metrics = Appender(self.path / LOG), Appender(self.path / METRICS)
        self.events = event_writer(self.path, keep)

    def say(self, message):
        """One line to log.txt and to standard output, above the progress bar if there is one."""
        message = printable(message)
        if self.log_file:
            self.append(self.log_file, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n")
        try:
            tqdm.write(message)
            sys.stdout.flush()
        except OSError:                 # nobody reads any more; the run goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def append(self, file, text):
        file.write(text)
        if file.error and file.path not in self.failing:
            self.failing.add(file.path)
            self.say(f"{file.path} cannot be written ({file.error}): its lines are kept in memory until it can")
        elif not file.error:
            self.failing.discard(file.path)

    def save(self, state, best, last):
        """Saves a checkpoint, as the best one too if it is one; returns whether that worked.

        A failure is a warning, and OSError if it is the last save.  OSError, too, if the records of the run are gone; if the
        folder is, nothing is saved: another run may have begun in its place.
        """
        from utils import checkpoint

        lost = self.lost()
        if lost == LOCK and (os.path.lexists(self.path / LOCK) or not self.path.is_dir()):
            raise OSError(f"{self.path} was removed or replaced under this run: step {state['step']} was not saved")
        try:
            os.fsync(self.metrics.file.fileno())
            checkpoint.save(state, self.path)
            if best:
                checkpoint.save_best(self.path / CHECKPOINT)
            if last and self.metrics.error:
                raise self.metrics.error
        except OSError as error:
            if last or lost:
                raise
            self.say(f"step {state['step']} could not be saved ({error}): training goes on; "
                     + checkpoint.describe_last(self.path))
            return False
        if lost:
            raise OSError(f"{self.path / lost} was removed or replaced under this run: it ends; "
                          + checkpoint.describe_last(self.path))
        return True

    def lost(self):
        """The name of a file that this run holds open and that is not in the folder any more, LOCK first; or None."""
        held = {LOCK: self.lock, LOG: self.log_file.file, METRICS: self.metrics.file}
        return next((name for name, file in held.items() if not is_at(file, self.path / name)), None)

    def record(self, step, scalars):
        """tag -> value at a step, to metrics.jsonl and TensorBoard."""
        self.append(self.metrics, json.dumps({"step": step, **scalars}) + "\n")
        for tag, value in scalars.items():
            self.events.add_scalar(tag, value, step)

    def log(self, step, total_steps, alpha, means, rate, left):
        """A line of training means; rate: images per second of training, left: seconds to the end, evaluations included."""
        self.record(step, {f"train/{name}": value for name, value in means.items()} | {"train/lr": alpha})
        values = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.say(f"step {step}/{total_steps}  {values}  lr {alpha:.4g}  {rate:.0f} images/s  {duration(left)} left")

    def finish(self, steps, seconds, rates, top5, labeled, evaluations, flags, sessions, covered):
        """Writes results.json and says the error rates under every selection rule; top5: likewise, or None.

        labeled: error in percent on the run's own labeled images, without augmentation.
        covered: as `metrics.coverage` returns it.
        """
        if lost := self.lost():
            raise OSError(f"{self.path / lost} was removed or replaced under this run: {RESULTS} was not written")
        self.write_json(RESULTS, {"error_rate": rates, **({"top5_error_rate": top5} if top5 else {}),
                                  "labeled_error_rate": labeled, **({"images_covered": covered} if covered else {}),
                                  "evaluations": evaluations, "median_of": min(20, evaluations), "steps": steps,
                                  "seconds": round(seconds, 1), "args": flags, "sessions": sessions})
        validated = rates["best_validation"]
        self.say(f"finished {steps} steps in {duration(seconds)}: test error {rates['last']:.2f} % (last), "
                 f"{rates['median_last_20']:.2f} % ({median_name(evaluations)}), "
                 + (f"{validated:.2f} % (best on validation), " if validated is not None else "")
                 + f"{rates['best_test']:.2f} % (lowest, so selected on the test set)"
                 + (f"; top-5 error {top5['last']:.2f} % (last)" if top5 else "")
                 + f"; error on its own labeled images {labeled:.2f} %"
                 + "".join(f"; over {fewest:,} of {count:,} {part} images" for part, (fewest, count) in covered.items()))
        self.close()

    def has_results(self, saved):
        """Whether results.json is there and tells of the run and step of the checkpoint `saved`."""
        from utils.records import difference, read_results

        try:
            results = read_results(self.path)
        except UsageError:
            return False
        return results["steps"] == saved["step"] and not difference(results["args"], saved["args"])

    @contextmanager
    def progress(self, start, total_steps):
        """A progress bar on a terminal, nothing elsewhere; `advance` moves it.  An exception closes the folder's files."""
        self.bar = tqdm(initial=start, total=total_steps, unit="step", disable=None, dynamic_ncols=True)
        try:
            yield
        except BaseException:
            self.close()                # ends the thread of tensorboardX, which would speak at the exit of the program
            raise
        finally:
            with suppress(OSError):
                self.bar.close()

    def advance(self):
        try:
            self.bar.update()
        except OSError:                 # the terminal is gone; the run goes on
            self.bar.disable = True

    def write_json(self, name, content):
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")

    def close(self):
        for file in (self.events, self.metrics, self.log_file, self.lock):
            if file:
                file.close()


class NoFolder:
    """In place of a RunFolder in a process that writes nothing: every method does nothing."""

    source = None

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def progress(self, start, total_steps):
        return nullcontext()


def event_writer(path, keep):
    """A tensorboardX writer of a run folder, in which later points replace those after step `keep`.

    tensorboardX writes in a thread, which a full disk would end and the next points would wait for: so it writes to
    an Appender, by its own register of places to write to.
    """
    from tensorboardX import SummaryWriter
    from tensorboardX.record_writer import register_writer_factory

    class Place:
        def open(self, name):
            return Appender(name.removeprefix("run:"))

        def directory_check(self, name):
            pass

    register_writer_factory("run", Place())
    return SummaryWriter(f"run:{path}", purge_step=keep + 1 if keep else None, filename_suffix=EVENTS)


def read_split(path):
    """The indices in a label_indices.txt, a list of ints; checked against the split.json beside it, if there is one.

    Raises UsageError, which names the file, for anything that is not a list of different indices, one a line.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file: give a file of indices, one a line")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from None
    lines = text.split()
    for line in lines:
        if not (line.isascii() and line.isdigit() and len(line) < 16):
            raise UsageError(f"{path}: {line[:40]!r} is not the index of an image")
    if len(set(map(int, lines))) < len(lines):
        raise UsageError(f"{path} names an image twice")
    split = path.with_name(SPLIT)
    if split.exists():
        try:
            expected = json.loads(split.read_text(encoding="utf-8"))["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(f"{split} is damaged: restore it or remove it") from None
        if expected != hashlib.sha256(text.encode()).hexdigest():
            raise UsageError(f"{path} is not the split whose SHA-256 is in {split.name}: restore it")
    return [int(line) for line in lines]


def read_given_split(path, num_label=None):
    """The indices of --split, ascending, a list of ints.

    Raises UsageError as `read_split` does, for no index at all, and if num_label is another number.
    """
    try:
        indices = sorted(read_split(path))
    except UsageError as error:
        raise UsageError(f"argument --split: {error}") from None
    if not indices:
        raise UsageError(f"argument --split: {path} names no image: write one index a line")
    if num_label not in (None, len(indices)):
        raise UsageError(f"argument --num-label: {num_label}, but --split {path} has {len(indices)} lines: leave the flag out")
    return indices


def take_back(path, keep, step_of):
    """Removes from a file of lines those of steps after `keep`, and a last one that was not written to its end."""
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if line.endswith("\n")]
        write_text(path, "".join(line for line in lines if step_of(line) <= keep))


def step_of_record(line):
    """Of a line of metrics.jsonl; infinite if it is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def step_of_line(line):
    """Of a line of log.txt; 0 if it is of no step."""
    match = re.match(r"\S+ \S+  step (\d+)/", line)
    return int(match[1]) if match else 0


def duration(seconds):
    """For example "2 h 05 min", "3 min 20 s", "7 s"."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


def median_name(evaluations):
    """What the median of the last 20 is over, in a run with this number of evaluations."""
    if evaluations > 20:
        return "median of the last 20 evaluations"
    return "median of " + (f"all {evaluations} evaluations" if evaluations > 1 else "the only evaluation")


def git_commit():
    """The commit of this checkout, with "-dirty" if it was changed; elsewhere METASEMI_COMMIT, as in the image, or None."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], check=True,
                              capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("METASEMI_COMMIT") or None
