"""Learning rate and ramp as pure functions of the step.  Step n is the n-th update; step 0 is before the first."""
from collections.abc import Sequence
from math import cos, pi


def learning_rate(step: int, lr: float, warmup: int = 0, milestones: Sequence[int] = (), gamma: float = 0.1,
                  total_steps: int | None = None) -> float:
    """Returns the learning rate of a step: a linear warm-up from 0 to `lr`, then a factor `gamma` for every milestone passed;
    with `total_steps`, after the warm-up half a cosine down to 0 at step `total_steps` instead of the milestones.

    The step that equals a milestone is the last one before the decay.
    """
    if total_steps is None:
        passed = sum(step > milestone for milestone in milestones)
        return ramp(step, warmup, lr) * gamma ** passed
    if step <= warmup:
        return ramp(step, warmup, lr)
    return lr * (1 + cos(pi * (step - warmup) / (total_steps - warmup))) / 2


def ramp(step: int, warmup: int, weight: float = 1.0) -> float:
    """Returns what grows linearly from 0 at step 0 to `weight` at step `warmup` and stays there; `weight` if `warmup` is 0."""
    return weight * step / warmup if step < warmup else weight
