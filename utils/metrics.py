"""What a run measures: means over the steps between log lines, accuracy, and error rates under every selection rule."""
import statistics

import torch


class Meter:
    """Means of training scalars since the last `read`, summed on the device: only `read` and `check` wait for it.

    It also remembers, on the device, the last step that was finite and its loss.
    """

    def __init__(self):
        self.names, self.total, self.count = None, None, 0
        self.finite = self.last_loss = self.last_step = None

    def add(self, step, finite, scalars):
        """finite: () bool tensor.  scalars: name -> () tensor, the same names at every step, "loss" among them."""
        loss, values = scalars["loss"], torch.stack(list(scalars.values()))
        if self.names is None:
            self.names, self.total = list(scalars), torch.zeros_like(values)
            self.finite = finite
            self.last_loss, self.last_step = torch.full_like(loss, torch.nan), torch.full_like(loss, step - 1)
        self.finite = self.finite & finite
        self.last_loss = torch.where(self.finite, loss, self.last_loss)
        self.last_step = torch.where(self.finite, step, self.last_step)
        self.total += values
        self.count += 1

    def check(self):
        """Raises Diverged if any step so far was not finite."""
        if self.finite is not None and not self.finite.item():
            step, loss = int(self.last_step.item()), self.last_loss.item()
            raise Diverged(f"the loss or its gradient is not finite at step {step + 1}, whose update was left out; "
                           + (f"the last finite loss was {loss:.4g} at step {step}" if loss == loss
                              else "none was finite before"))

    def read(self):
        """name -> mean since the last read."""
        means = dict(zip(self.names, (self.total / self.count).tolist()))
        self.total.zero_()
        self.count = 0
        return means


class Diverged(ArithmeticError):
    """Training left the finite numbers."""


def all_finite(tensors):
    """Whether every entry of some tensors is finite; waits for the device once."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


@torch.no_grad()
def evaluate(model, batches, dtype=None, stop=lambda: False):
    """{"accuracy"} in [0, 1] over batches of (x, y), in evaluation mode; None if `stop()` became true on the way.

    With more than ten classes there is "top5" as well, the share of images whose class is among the five likeliest.
    """
    model.eval()
    correct, among_five, count = 0, 0, 0
    for x, y in batches:
        if stop():
            return None
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            logits = model(x)
        correct = correct + (logits.argmax(dim=1) == y).sum()
        if logits.shape[1] > 10:
            among_five = among_five + (logits.topk(5, dim=1).indices == y[:, None]).sum()
        count += len(y)
    return {"accuracy": correct.item() / count} | ({"top5": among_five.item() / count} if logits.shape[1] > 10 else {})


def error_rates(evaluations, measure="test"):
    """Test error rate in percent under every selection rule, from [{"step", "test", "validation"?}], accuracies in [0, 1].

    "last" and "median_last_20" select nothing.  "best_validation" is the error where the held-out images were
    classified best (None without them).  "best_test" is selected on the test set itself, and so too low.
    measure: "test", or "test_top5" for the top-5 error of what the same rules select; None where it was not measured.
    """
    def error(evaluation):
        return round(100 * (1 - evaluation[measure]), 4)

    if measure not in evaluations[-1]:
        return None
    validated = [e for e in evaluations if e.get("validation") is not None]
    return {
        "last": error(evaluations[-1]),
        "median_last_20": round(statistics.median(error(e) for e in evaluations[-20:]), 4),
        "best_validation": error(max(validated, key=lambda e: e["validation"])) if validated else None,
        "best_test": error(max(evaluations, key=lambda e: e["test"])),
    }
