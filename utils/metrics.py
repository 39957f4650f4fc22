"""What a run measures: means over the steps between log lines, accuracy, and error rates under every selection rule."""
import math
import statistics
import time
from contextlib import contextmanager

import torch

from datasets.table import UNLABELED, DataError
from metasemi.step import accuracy
from utils.failure import Diverged

NO_IMAGE = "not one of the images to evaluate can be read: give readable ones"


class Meter:
    """Means of training scalars since the last `read`, summed on the device: only `read` and `check` wait for it.

    A scalar that is NaN, the accuracy on images none of which has a class, is left out of its mean.
    It also remembers, on the device, the last step that was finite and its loss.
    """

    def __init__(self):
        self.total = self.count = 0.0
        self.finite, self.last_loss, self.last_step = True, math.nan, None

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
        self.add(step, result.finite, scalars)

    def add(self, step, finite, scalars):
        """finite: () bool tensor.  scalars: name -> () tensor, the same names at every step, "loss" among them."""
        self.names, values = list(scalars), torch.stack(list(scalars.values()))
        self.finite = finite & self.finite
        self.last_loss = torch.where(self.finite, scalars["loss"], self.last_loss)
        self.last_step = torch.where(self.finite, step, step - 1 if self.last_step is None else self.last_step)
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
        """name -> mean since the last read, of those that have one; all_reduce_mean: a list of tensors to their means over
        the processes."""
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

    def seconds(self):
        """Of the run so far."""
        return time.perf_counter() - self.start

    @contextmanager
    def paused(self):
        """Inside, no time of training passes."""
        start = time.perf_counter()
        yield
        self.pause = time.perf_counter() - start
        self.last += self.pause

    def rate(self, step):
        """Steps per second of training since the last call."""
        now = time.perf_counter()
        rate = (step - self.step) / (now - self.last)
        self.step, self.last = step, now
        return rate


def all_finite(tensors):
    """Whether every entry of some tensors is finite; waits for the device once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def count_broken(logits):
    """How many rows of logits (B, K) hold something that is not finite, () on their device."""
    return (~logits.isfinite().all(dim=1)).sum()


def check_logits(broken, count):
    """Raises Diverged if some of the `count` images have logits that are not finite: their argmax is no prediction."""
    if broken:
        raise Diverged(f"the logits of {broken:,.0f} of {count:,.0f} images are not finite in evaluation mode")


@torch.no_grad()
def evaluate(model, batches, dtype=None, stop=lambda: False, all_reduce_sum=None):
    """{"accuracy"} in [0, 1] over batches of (x, y), in evaluation mode; None if `stop()` became true on the way.

    With more than ten classes there is "top5" as well, the share of images whose class is among the five likeliest.
    "images" is how many there were; DataError if there was none, and Diverged if logits are not finite.
    all_reduce_sum: a list of numbers to their sums over the processes, if each has a shard of one set.  An error that the
    batches raise in one of them is raised there, and the others get None.
    """
    model.eval()
    correct = among_five = broken = torch.tensor(0)
    count, many, stopped, fault = 0, False, False, None
    try:
        for x, y in batches:
            if stop():
                stopped = True
                break
            if len(y) == 0:             # fewer images than processes
                continue
            with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
                logits = model(x)
            broken = broken + count_broken(logits)
            correct = correct + (logits.argmax(dim=1) == y).sum()
            many = logits.shape[1] > 10
            if many:
                among_five = among_five + (logits.topk(5, dim=1).indices == y[:, None]).sum()
            count += len(y)
    except (DataError, OSError) as error:
        fault, stopped = error, True
    sums = [correct.item(), among_five.item(), broken.item(), count, many, stopped]
    correct, among_five, broken, count, many, stopped = all_reduce_sum(sums) if all_reduce_sum else sums
    if fault and not isinstance(fault, InterruptedError):
        raise fault
    if stopped:
        return None
    if count == 0:
        raise DataError(NO_IMAGE)
    check_logits(broken, count)
    return {"accuracy": correct / count} | ({"top5": among_five / count} if many else {}) | {"images": int(count)}


@torch.no_grad()
def predict(model, batches, dtype=None):
    """Predicted classes (N,) int64, probabilities (N, K) float32 and all y, on the CPU, over the batches (x, y).

    In evaluation mode, and with the same batches as in `evaluate` the same predictions.  Raises DataError if there is no
    image, and Diverged as `evaluate` does.
    """
    model.eval()
    predicted, probabilities, targets, broken = [], [], [], []
    for x, y in batches:
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            logits = model(x)
        if len(logits) != len(x):
            raise ValueError(f"{len(logits)} rows of logits for {len(x)} images")
        targets.append(y)
        broken.append(count_broken(logits))
        predicted.append(logits.argmax(dim=1))
        probabilities.append(logits.float().softmax(dim=1).cpu())
    if not predicted:
        raise DataError(NO_IMAGE)
    predicted = torch.cat(predicted).cpu()
    check_logits(sum(broken).item(), len(predicted))
    return predicted, torch.cat(probabilities), torch.cat(targets).cpu()


def expected_calibration_error(confidence, correct, bins=15):
    """How far confidence is from accuracy, in [0, 1]: the mean over images of |accuracy - mean confidence| of their bin.

    The bins ((m - 1) / bins, m / bins] have equal width, and there are 15, as in Guo, Pleiss, Sun & Weinberger,
    "On Calibration of Modern Neural Networks", ICML 2017.

    confidence: (N,) float in [0, 1], the probability of the predicted class.  correct: (N,) bool.
    """
    confidence = confidence.double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, index, correct.double() - confidence)
    return (gap.abs().sum() / len(confidence)).item()


def coverage(evaluations, counts):
    """part -> [images that the evaluation with the fewest covered, of how many], of the parts where some were left out.

    evaluations: as in `error_rates`, with "test_images" or "validation_images" where an evaluation left some out.
    counts: part -> of how many images.
    """
    fewest = {part: min([e.get(f"{part}_images", count) for e in evaluations]) for part, count in counts.items()}
    return {part: [fewest[part], count] for part, count in counts.items() if fewest[part] < count}


def error_rates(evaluations, measure="test"):
    """Test error rate in percent under every selection rule, from [{"step", "test", "validation"?}], accuracies in [0, 1].

    "last" and "median_last_20" select nothing.  "best_validation" is the error where the held-out images were
    classified best (None without them).  "best_test" is selected on the test set itself, and so too low.
    measure: "test", or "test_top5" for the top-5 error of what the same rules select; None where it was not measured.
    """
    def error(evaluation):
        return round(100 * (1 - evaluation[measure]), 4)

    if any(measure not in evaluation for evaluation in evaluations):        # of an older version
        return None
    validated = [e for e in evaluations if e.get("validation") is not None]
    return {
        "last": error(evaluations[-1]),
        "median_last_20": round(statistics.median(error(e) for e in evaluations[-20:]), 4),
        "best_validation": error(max(validated, key=lambda e: e["validation"])) if validated else None,
        "best_test": error(max(evaluations, key=lambda e: e["test"])),
    }
