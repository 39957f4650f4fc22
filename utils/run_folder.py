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
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from utils.cli import UsageError
from utils.files import (
    ARGS,
    BEST,
    CHECKPOINT,
    INDICES,
    LAST,
    LOCK,
    LOG,
    METRICS,
    OURS,
    PREVIOUS,
    RESULTS,
    SPLIT,
    TEMPORARY,
    Appender,
    holds_run,
    is_at,
    link,
    open_lock,
    printable,
    sync,
    write_text,
)
from utils.flags import RESUME, difference, with_role
from utils.records import read_results, read_split

EVENTS = ".metasemi"        # how the names of our TensorBoard files end: other programs keep theirs in the same folder


def check_paths(path, resume, overwrite):
    """Raises UsageError for a run folder that a command must not touch, or a checkpoint that is missing; needs no torch.

    resume: None, LAST or the path of a checkpoint.
    """
    if resume not in (None, LAST) and not resume.exists():
        raise UsageError(f"argument --resume: {resume}: no such checkpoint (a missing file never means a fresh start)")
    if path.exists() and not path.is_dir():
        raise UsageError(f"argument --save-path: {path} is a file: give a folder")
    if resume == LAST or resume is not None and resume.parent.resolve() == path.resolve():     # the run in the folder
        if overwrite:
            raise UsageError("argument --overwrite: it removes what --resume continues: give one of them")
        if resume == LAST and has_lost_checkpoints(path):
            best = f", give --resume {path / BEST} --save-path {path}," if (path / BEST).exists() else ""
            raise UsageError(f"argument --resume: {path} holds a run that has lost its {CHECKPOINT} and {PREVIOUS}: restore one"
                             f"{best} or add --overwrite instead to start afresh")
    elif holds_run(path) and not overwrite:
        remedy = "give another" if resume else "add --resume to continue it"
        raise UsageError(f"argument --save-path: {path} holds a run: {remedy} or --overwrite to start afresh")


def has_lost_checkpoints(path):
    """Whether the run in a folder has no checkpoint, but was saved: it has an end, a best step, or a second evaluation."""
    if (path / CHECKPOINT).exists() or (path / PREVIOUS).exists():
        return False
    if (path / RESULTS).exists() or (path / BEST).exists():
        return True
    return (path / METRICS).is_file() and (path / METRICS).read_bytes().count(b'"test/accuracy"') > 1


class RunFolder:
    """One run's folder, locked against a second process from `lock` until `close`.

    writes: False in a process of a run that writes nothing; every method does nothing there.
    overwrite: `start` removes the run that is in the folder.
    """

    def __init__(self, path, writes=True, overwrite=False):
        self.path, self.writes, self.overwrite = Path(path), writes, overwrite
        self.lock_file = self.log_file = self.metrics = self.events = None
        self.source = self.bar = None
        self.printed = set()            # lines of `print_once`

    def lock(self):
        """Makes the folder and locks it.  Raises UsageError if another process has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / LOCK).is_symlink():
            raise UsageError(f"argument --save-path: {self.path / LOCK} is a symbolic link, which is not followed: remove it")
        self.lock_file = open_lock(self.path / LOCK)
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.path} is in use by process {self.lock_file.read().strip() or 'unknown'}") from None
        if not is_at(self.lock_file, self.path / LOCK):
            raise UsageError(f"{self.path} was removed or replaced while this command began: give it again")
        self.lock_file.truncate(0)
        self.lock_file.write(str(os.getpid()))
        self.lock_file.flush()

    def open(self, resume):
        """What a command that `check_paths` let pass may continue: a checkpoint, a text that says where it is from, and
        whether results.json tells of it; (None, None, False) for nothing.  Writes nothing but the lock."""
        from utils import checkpoint

        saved = why = None
        if self.writes and holds_run(self.path):
            self.lock()
        if self.writes and resume not in (None, LAST):
            saved, why = checkpoint.load(resume), f"{resume}, as --resume says"
        elif self.lock_file and resume and (last := checkpoint.load_last(self.path, warn=self.print)):
            saved, self.source, why = last
        return saved, why, saved is not None and self.has_results(saved)

    def start(self, state):
        """Writes what the run is and opens its records, with everything after the step of the state taken out of them.

        A run from step 0 first removes the files of an older one, by name; no file of another program is touched.
        Raises UsageError if another process has left a run here by now.
        """
        if not self.writes:
            return
        if self.lock_file is None:
            self.lock()
            if holds_run(self.path):
                raise UsageError(f"argument --save-path: {self.path} holds a run that began after this command: give another")
        clear = state.step == 0 or self.overwrite
        labeled = state.labeled.tolist()
        if not clear and (self.path / INDICES).exists() and read_split(self.path / INDICES) != labeled:
            raise UsageError(f"{self.path / INDICES} is not the split that the checkpoint was trained on: restore it "
                             "or remove it, and it is written again")
        old = [RESULTS, *(name + TEMPORARY for name in OURS)]      # a kill may have left these half written
        if clear:
            old += [*OURS, *(path.name for path in self.path.glob(f"events.out.tfevents.*{EVENTS}"))]
        for name in old:
            (self.path / name).unlink(missing_ok=True)
        if self.source and self.source.name == PREVIOUS:    # so that the next save does not keep the damaged one
            link(self.source, self.path / CHECKPOINT)
        if self.source and state.is_best():                 # a kill may have kept `save` from saying so
            link(self.source, self.path / BEST)
        truncate_after(state.step, self.path / METRICS, step_of_record)
        truncate_after(state.step, self.path / LOG, step_of_line)
        indices = "".join(f"{index}\n" for index in labeled)
        write_text(self.path / INDICES, indices)
        self.write_json(SPLIT, {"sha256": hashlib.sha256(indices.encode()).hexdigest(), "dataset": state.args["dataset"],
                                "labels_sha256": state.labels_sha256, "num_label": len(labeled), "seed": state.args["seed"],
                                "validation": state.validation.tolist()})
        self.write_json(ARGS, {"args": state.args, "sessions": state.sessions})
        self.log_file, self.metrics = Appender(self.path / LOG), Appender(self.path / METRICS)
        self.events = event_writer(self.path, state.step)

    def print(self, *messages):
        """One line each to log.txt and to standard output, above the progress bar if there is one."""
        for message in map(printable, messages if self.writes else ()):
            if self.log_file:
                self.append(self.log_file, f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n")
            try:
                tqdm.write(message)
                sys.stdout.flush()
            except OSError:             # nobody reads any more; the run goes on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def print_once(self, messages):
        """As `print`, for each of some lines that was not printed so before."""
        new = [message for message in messages if message not in self.printed]
        self.printed.update(new)
        self.print(*dict.fromkeys(new))

    def append(self, file, text):
        failed_before = file.error
        file.write(text)
        if file.error and not failed_before:
            self.print(f"{file.path} cannot be written ({file.error}): its lines are kept in memory until it can")

    def save(self, state, best, last):
        """Saves the state of the run, as the best one too if it is that; returns whether that worked.

        A failure is a warning, and OSError if it is the last save.  OSError, too, if the records of the run are gone; if the
        folder is, nothing is saved: another run may have begun in its place.
        """
        from utils import checkpoint

        if not self.writes:
            return True
        lost = self.lost()
        if lost == LOCK and (os.path.lexists(self.path / LOCK) or not self.path.is_dir()):
            raise OSError(f"{self.path} was removed or replaced under this run: step {state.step} was not saved")
        try:
            os.fsync(self.metrics.file.fileno())
            checkpoint.save(state.state_dict(), self.path)
            if best:
                link(self.path / CHECKPOINT, self.path / BEST)
                sync(self.path)
            if last and self.metrics.error:
                raise self.metrics.error
        except OSError as error:
            if last or lost:
                raise
            self.print(f"step {state.step} could not be saved ({error}): training goes on; "
                     + checkpoint.describe_last(self.path))
            return False
        if lost:
            raise OSError(f"{self.path / lost} was removed or replaced under this run: it ends; "
                          + checkpoint.describe_last(self.path))
        return True

    def lost(self):
        """The name of a file that this run holds open and that is not in the folder any more, LOCK first; or None."""
        held = {LOCK: self.lock_file, LOG: self.log_file.file, METRICS: self.metrics.file}
        return next((name for name, file in held.items() if not is_at(file, self.path / name)), None)

    def record(self, step, scalars):
        """tag -> value at a step, to metrics.jsonl and TensorBoard."""
        if not self.writes:
            return
        self.append(self.metrics, json.dumps({"step": step, **scalars}) + "\n")
        for tag, value in scalars.items():
            self.events.add_scalar(tag, value, step)

    def log_means(self, step, total_steps, alpha, means, rate, left):
        """A line of training means; rate: images per second of training, left: seconds to the end, evaluations included."""
        self.record(step, {f"train/{name}": value for name, value in means.items()} | {"train/lr": alpha})
        values = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.print(f"step {step}/{total_steps}  {values}  lr {alpha:.4g}  {rate:.0f} images/s  {duration(left)} left")

    def finish(self, state, labeled, counts):
        """Writes results.json and prints the error rates under every selection rule.

        labeled: error in percent on the run's own labeled images, without augmentation.
        counts: as for `metrics.coverage`.
        """
        from utils.metrics import coverage, error_rates

        if not self.writes:
            return
        if lost := self.lost():
            raise OSError(f"{self.path / lost} was removed or replaced under this run: {RESULTS} was not written")
        count, covered = len(state.evaluations), coverage(state.evaluations, counts)
        labeled_error = round(100 * (1 - labeled["accuracy"]), 4)
        if labeled["images"] < len(state.labeled):
            covered["labeled"] = [int(labeled["images"]), len(state.labeled)]
        rates, top5 = error_rates(state.evaluations), error_rates(state.evaluations, "test_top5")
        self.write_json(RESULTS, {"error_rate": rates, **({"top5_error_rate": top5} if top5 else {}),
                                  "labeled_error_rate": labeled_error, **({"images_covered": covered} if covered else {}),
                                  "evaluations": count, "median_of": min(20, count), "steps": state.step,
                                  "seconds": round(state.seconds, 1), "args": state.args, "sessions": state.sessions})
        validated = rates["best_validation"]
        self.print(f"finished {state.step} steps in {duration(state.seconds)}: test error {rates['last']:.2f} % (last), "
                   f"{rates['median_last_20']:.2f} % ({median_name(count)}), "
                   + (f"{validated:.2f} % (best on validation), " if validated is not None else "")
                   + f"{rates['best_test']:.2f} % (lowest, so selected on the test set)"
                   + (f"; top-5 error {top5['last']:.2f} % (last)" if top5 else "")
                   + f"; error on its own labeled images {labeled_error:.2f} %"
                   + "".join(f"; over {fewest:,} of {n:,} {name} images" for name, (fewest, n) in covered.items()))
        self.close()

    def has_results(self, saved):
        """Whether results.json is there and tells of the run and step of the checkpoint `saved`."""
        try:
            results = read_results(self.path)
        except UsageError:
            return False
        return results["steps"] == saved["step"] and difference(saved["args"], results["args"], with_role(RESUME)) is None

    @contextmanager
    def progress(self, start, total_steps):
        """A progress bar on a terminal, nothing elsewhere; `advance` moves it.  An exception closes the folder's files."""
        self.bar = tqdm(initial=start, total=total_steps, unit="step", disable=None if self.writes else True,
                        dynamic_ncols=True)
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
        for file in (self.events, self.metrics, self.log_file, self.lock_file):
            if file:
                file.close()


def event_writer(path, step):
    """A tensorboardX writer of a run folder, in which later points replace those after a step.

    tensorboardX writes in a thread, which a full disk would end and the next points would wait for: so it writes to
    an Appender, by its own register of places to write to.
    """
    from tensorboardX import SummaryWriter
    from tensorboardX.record_writer import register_writer_factory

    register_writer_factory("run", SimpleNamespace(open=lambda name: Appender(name.removeprefix("run:")),
                                                   directory_check=lambda name: None))
    return SummaryWriter(f"run:{path}", purge_step=step + 1 if step else None, filename_suffix=EVENTS)


def truncate_after(step, path, step_of):
    """Removes from a file of lines those of later steps, and a last one that was not written to its end."""
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if line.endswith("\n")]
        write_text(path, "".join(line for line in lines if step_of(line) <= step))


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
