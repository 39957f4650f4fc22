"""The files of one run.  `metrics.jsonl` is the durable record; the TensorBoard events are a view of it."""
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from utils import checkpoint, files
from utils.device import get_random_state
from utils.errors import UsageError, printable
from utils.meters import duration, error_rates

EVENTS = ".metasemi"        # how the names of our TensorBoard files end: other programs keep theirs in the same folder
STEP_OF_LINE = re.compile(r'(?:\{"step": |\S+ \S+  step )(\d{1,15})[,/]')        # in metrics.jsonl, or in log.txt


class RunFolder:
    """One run's folder, locked against a second process from `open` or `start` until `close`.

    world: the processes of the run, of which the first alone writes; in the others every method does nothing.
    """

    def __init__(self, path, world):
        self.path, self.world, self.writes = Path(path), world, world.rank == 0
        self.state = self.checkpoint = self.lock_file = self.log_file = self.metrics = self.events = None
        self.bar = tqdm(disable=True)

    def open(self, resume):
        """Returns the checkpoint to continue from, where it is from, and whether the run is finished; (None, None, False) for
        nothing.  Writes nothing but the lock.
        """
        saved, where, finished = None, None, False
        if self.writes and files.holds_run(self.path):
            self.lock_file = files.lock(self.path, self.print)
        if self.writes and resume not in (None, files.LAST):
            saved, where = checkpoint.load(resume), resume
        elif self.lock_file and resume and (last := checkpoint.load_last(self.path, warn=self.print)):
            saved, where = last
            self.checkpoint = where
        with suppress(UsageError):              # no results.json, or a damaged one
            results = files.read_results(self.path)
            finished = saved is not None and (results["steps"], results["args"]) == (saved["step"], saved["args"])
        return saved, where, finished

    def start(self, state, overwrite):
        """Writes what the run is, and opens its records, without what came after the step of the state, and a progress bar.

        A run from step 0, or one that may overwrite, first removes the files of an older one, by name; no file of another
        program is touched.  Raises UsageError if another process has left a run here by now.
        """
        self.state = state
        if not self.writes:
            return
        if self.lock_file is None:
            self.lock_file = files.lock(self.path, self.print)
            if files.holds_run(self.path):
                raise UsageError(f"argument --save-path: {self.path} holds a run that began after this command: give another")
        clear = state.step == 0 or overwrite
        labeled = state.labeled.tolist()
        if not clear and (self.path / files.INDICES).exists() and files.read_split(self.path / files.INDICES) != labeled:
            raise UsageError(f"{self.path / files.INDICES} is not the split that the checkpoint was trained on: restore it "
                             "or remove it, and it is written again")
        old = [files.RESULTS, *(name + files.TEMPORARY for name in files.RUN_FILES)]     # as a kill may leave them
        if clear:
            old += {*files.RUN_FILES} - {files.ARGS}
            old += [path.name for path in self.path.glob(f"events.out.tfevents.*{EVENTS}")]
        # On a full disk this fails, and a finished run is left as it was.
        files.write_json(self.path / files.ARGS, {"args": state.args, "files": state.files, "sessions": state.sessions})
        for name in old:
            (self.path / name).unlink(missing_ok=True)
        if self.checkpoint and self.checkpoint.name == files.PREVIOUS:    # the next save must not keep the damaged one
            files.link(self.checkpoint, self.path / files.CHECKPOINT)
        if self.checkpoint and state.is_best():                         # a kill may have kept `save` from saying so
            files.link(self.checkpoint, self.path / files.BEST)
        for name in (files.METRICS, files.LOG):
            truncate_after(state.step, self.path / name)
        indices = "".join(f"{index}\n" for index in labeled)
        files.write_text(self.path / files.INDICES, indices)
        files.write_json(self.path / files.SPLIT, {
            "sha256": hashlib.sha256(indices.encode()).hexdigest(), "dataset": state.args["dataset"],
            "labels_sha256": state.data["training labels"], "num_label": len(labeled), "seed": state.args["seed"],
            "validation": state.validation.tolist()})
        self.log_file, self.metrics = (files.Appender(self.path / name, self.print) for name in (files.LOG, files.METRICS))
        self.events = event_writer(self.path, state.step)
        self.bar = tqdm(initial=state.step, total=state.args["total_steps"], unit="step", disable=None, dynamic_ncols=True)

    def print(self, *messages):
        """Writes one line each to log.txt and to standard output, above the progress bar if there is one."""
        for message in map(printable, messages if self.writes else ()):
            if self.log_file:
                self.log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n")
            try:
                tqdm.write(message)
                sys.stdout.flush()
            except OSError:             # nobody reads any more; the run goes on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def save(self, seconds, last=True):
        """Saves the state, and as the best one too if it is that.

        seconds: that the run has taken.  A failure is a warning, and OSError if it is the last save.  Raises Diverged or
        RunFailure, and saves nothing, unless the weights are finite and the same in all processes.
        """
        state = self.state
        state.check_finite()
        self.world.check_replicas(state.model.state_dict(), state.step)
        state.seconds = seconds
        state.rng = self.world.all_gather_object(get_random_state(state.device))
        if not self.writes:
            return
        try:
            os.fsync(self.metrics.file.fileno())
            checkpoint.save(state.state_dict(), self.path)
            if state.is_best():
                files.link(self.path / files.CHECKPOINT, self.path / files.BEST)
                files.sync(self.path)
            if last and self.metrics.error:
                raise self.metrics.error
        except OSError as error:
            if last:
                raise
            self.print(f"step {state.step} could not be saved ({error}): training goes on; "
                       + checkpoint.describe_last(self.path))

    def log(self, scalars, words):
        """Writes tag -> value to metrics.jsonl and TensorBoard, and words about them to the log, at the step of the state."""
        if not self.writes:
            return
        step = self.state.step
        self.metrics.write(json.dumps({"step": step, **scalars}) + "\n")
        for tag, value in scalars.items():
            self.events.add_scalar(tag, value, step)
        self.print("  ".join([f"step {step}/{self.state.args['total_steps']}", *words]))

    def log_means(self, alpha, means, rate, left):
        """Writes training means; rate: images per second of training, left: seconds to the end, evaluations included."""
        means = means | {"lr": alpha}
        self.log({f"train/{name}": value for name, value in means.items()},
                 [*(f"{name} {value:.4g}" for name, value in means.items()), f"{rate:.0f} images/s", f"{duration(left)} left"])

    def log_accuracies(self, scalars):
        """Writes accuracies, as `evaluation.measure_sets` returns them; the log has the errors."""
        self.log(scalars, [f"{tag.replace('/accuracy', '').replace('/top5', ' top-5')} error {100 * (1 - value):.2f} %"
                           for tag, value in scalars.items()])

    def finish(self, labeled):
        """Writes results.json and prints the error rates under every selection rule.

        labeled: accuracy in [0, 1] on the run's own labeled images, without augmentation.
        """
        if not self.writes:
            return
        state, labeled_error = self.state, round(100 * (1 - labeled), 4)
        count, rates, top5 = len(state.evaluations), error_rates(state.evaluations), error_rates(state.evaluations, "test_top5")
        files.write_json(self.path / files.RESULTS, {
            "error_rate": rates, **({"top5_error_rate": top5} if top5 else {}), "labeled_error_rate": labeled_error,
            "evaluations": count, "median_of": min(20, count), "steps": state.step, "seconds": round(state.seconds, 1),
            "args": state.args, "files": state.files, "sessions": state.sessions})
        rules = {"last": "last", "median_last_20": f"median of the last {min(20, count)} evaluations",
                 "best_validation": "best on validation", "best_test": "lowest, so selected on the test set"}
        self.print(f"finished {state.step} steps in {duration(state.seconds)}: test error "
                   + ", ".join(f"{rates[rule]:.2f} % ({said})" for rule, said in rules.items() if rates[rule] is not None)
                   + (f"; top-5 error {top5['last']:.2f} % (last)" if top5 else "")
                   + f"; error on its own labeled images {labeled_error:.2f} %")

    def close(self):
        for file in (self.bar, self.events, self.metrics, self.log_file, self.lock_file):
            if file is not None:
                file.close()


def event_writer(path, step):
    """Returns a tensorboardX writer of a run folder, in which later points replace those after a step.

    tensorboardX writes in a thread, which a full disk would end and the next points would wait for: so it writes to
    an Appender, by its own register of places to write to.
    """
    from tensorboardX import SummaryWriter
    from tensorboardX.record_writer import register_writer_factory

    register_writer_factory("run", SimpleNamespace(open=lambda name: files.Appender(name.removeprefix("run:")),
                                                   directory_check=lambda name: None))
    return SummaryWriter(f"run:{path}", purge_step=step + 1 if step else None, filename_suffix=EVENTS)


def truncate_after(step, path):
    """Removes the lines of later steps from a log or metrics.jsonl, and a last one that was not written to its end."""
    def kept(line):
        found = STEP_OF_LINE.match(line)
        return line.endswith("\n") and (int(found[1]) <= step if found else path.name == files.LOG)

    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            files.write_text(path, "".join(filter(kept, file)))


def git_commit():
    """Returns the commit of this checkout, with "-dirty" if it was changed; else METASEMI_COMMIT, as in the image, or None."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], check=True,
                              capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("METASEMI_COMMIT") or None
