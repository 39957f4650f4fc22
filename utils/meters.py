"""What a run measures: means over the steps between log lines, time, and error rates under every selection rule."""
import math
import statistics
import time
from contextlib import contextmanager

import torch

from datasets.table import UNLABELED
from metasemi.step import accuracy
from utils.errors import Diverged

FIRST_SIGN = 5          # seconds of training before the first word about its speed


class Meter:
    """Means of training scalars since the last `read`, summed on the device: only `read` and `check` wait for it.

    A scalar that is NaN, the accuracy on images none of which has a class, is left out of its mean.
    It also remembers, on the device, the last step that was finite and its loss.
    """

    def __init__(self, step=0):
        """step: where the steps begin."""
        self.total = self.count = 0.0
        self.finite, self.last_loss, self.last_step = True, math.nan, step

    def add_step(self, step, result, y_u):
        """result: what `training_step` returns.  y_u: (B,) labels of the unlabeled images, or UNLABELED; None without any.

        Accuracies are over the images that have a class.
        """
        scalars = {"loss": result.loss, **result.telemetry}
        if result.y_tilde is not None:
            known = (y_u != UNLABELED).float().mean()
            scalars["unlabel-acc"] = accuracy(result.y_tilde, y_u) / known
        if result.y_hat is not None and result.y_hat is not result.y_tilde:
            scalars["pseudo-acc"] = accuracy(result.y_hat, y_u) / known
        self.names, values = list(scalars), torch.stack(list(scalars.values()))
        self.finite = result.finite & self.finite
        self.last_loss = torch.where(self.finite, result.loss, self.last_loss)
        self.last_step = torch.where(self.finite, step, self.last_step)
        known = ~values.isnan()
        self.total = self.total + values.where(known, 0)
        self.count = self.count + known

    def check(self):
        """Raises Diverged if any step so far was not finite."""
        if not self.finite:
            step, loss = self.last_step.item(), self.last_loss.item()
            raise Diverged(f"the loss or its gradient is not finite at step {step + 1}, whose update was left out; "
                           + (f"the last finite loss was {loss:.4g} at step {step}" if loss == loss
                              else "none was finite before"))

    def read(self, all_reduce_mean):
        """Returns name -> mean since the last read, of those that have one.  Raises Diverged as `check` does.

        all_reduce_mean: a function from a list of tensors to their means over the processes.
        """
        self.check()
        total, count = all_reduce_mean([self.total, self.count])
        means = dict(zip(self.names, (total / count).tolist()))
        self.total = self.count = 0.0
        return {name: mean for name, mean in means.items() if mean == mean}


class Timer:
    """The seconds of a run, and the speed of its training alone, without evaluation and saving."""

    def __init__(self, seconds, step):
        """seconds, step: how long and how far the run has come in its sessions before."""
        self.step, self.last = step, time.perf_counter()
        self.start = self.last - seconds
        self.pause = 0.0                # the seconds of the last evaluation, with its save
        self.silent = True              # whether nothing was said of the speed yet

    def seconds(self):
        """Returns the seconds of the run so far."""
        return time.perf_counter() - self.start

    @contextmanager
    def paused(self):
        """Lets no time of training pass inside."""
        start = time.perf_counter()
        yield
        self.pause = time.perf_counter() - start
        self.last += self.pause

    def speed(self, step, total_steps, test_freq):
        """Returns the seconds of a step of training since the last call, and of all that is left, evaluations included."""
        now = time.perf_counter()
        seconds = max(now - self.last, 1e-9) / (step - self.step)       # a clock may stand still
        self.step, self.last, self.silent = step, now, False
        return seconds, (total_steps - step) * (seconds + self.pause / test_freq)

    def first_sign(self, step, total_steps):
        """Returns the speed and the time left in words, once training has gone on for some seconds without any; else None."""
        seconds = time.perf_counter() - self.last
        if not self.silent or seconds < FIRST_SIGN:
            return None
        self.silent, rate = False, (step - self.step) / seconds
        return f"{rate:.3g} steps/s, {duration((total_steps - step) / rate)} left without evaluations"


def all_finite(tensors):
    """Returns whether every entry of some tensors is finite; waits for the device once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def error_rates(evaluations, measure="test"):
    """Returns the test error rate in percent under every selection rule, or None where `measure` was not taken.

    "last" and "median_last_20" select nothing.  "best_validation" is the error where the held-out images were
    classified best (None without them).  "best_test" is selected on the test set itself, and so too low.

    evaluations: dicts with "step", "test" and perhaps "validation" and "test_top5", accuracies in [0, 1].
    measure: "test", or "test_top5" for the top-5 error of what the same rules select.
    """
    def error(evaluation):
        return round(100 * (1 - evaluation[measure]), 4)

    if any(measure not in evaluation for evaluation in evaluations):
        return None
    validated = [e for e in evaluations if e.get("validation") is not None]
    return {
        "last": error(evaluations[-1]),
        "median_last_20": round(statistics.median(error(e) for e in evaluations[-20:]), 4),
        "best_validation": error(max(validated, key=lambda e: e["validation"])) if validated else None,
        "best_test": error(max(evaluations, key=lambda e: e["test"])),
    }


def duration(seconds):
    """Returns for example "2 h 05 min", "3 min 20 s", "7 s"."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"
