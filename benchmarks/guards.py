"""What the guards cost: a save beside a bare torch.save, and steps with and without the checks for finite numbers.

    python3 benchmarks/guards.py

Both sides of a row take turns in one process; the ratio is the median over the turns.
"""
import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from measuring import take_turns

sys.path.insert(0, str(Path(__file__).parent.parent))
from metasemi import training_step  # noqa: E402
from models import build_model  # noqa: E402
from utils import checkpoint  # noqa: E402
from utils.interrupt import Interrupt  # noqa: E402
from utils.metrics import Meter  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=41, help="of each side (default: 41)")
    args = parser.parse_args(argv)
    print("| | without, ms | with, ms | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer, step = trainer("convlarge", 2, 16)
        step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
        compare("a save, convlarge, 25 MB", lambda: torch.save(state, Path(folder, "bare.pth")),
                lambda: checkpoint.save(state, folder), args.turns)
    for arch, batch_size, image_size, steps in (("convlarge", 32, 32, 1), ("convsmall", 64, 16, 10)):
        *_, step = trainer(arch, batch_size, image_size)
        name = f"{steps} step{'s' * (steps > 1)}, {arch}, {batch_size} + {batch_size} images of {image_size}x{image_size}"
        compare(name, partial(unguarded, step, steps), partial(guarded, step, steps), args.turns)


def trainer(arch, batch_size, image_size):
    torch.manual_seed(0)
    model = build_model(arch, 10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    x_l, x_u = torch.randn(2, batch_size, 3, image_size, image_size)
    y_l, lam = torch.randint(0, 10, (batch_size,)), torch.rand(batch_size)
    return model, optimizer, lambda: training_step(model, optimizer, x_l, y_l, x_u, alpha=0.01, beta=0.01, lam=lam)


def guarded(step, steps):
    """Polls for a signal, leaves out what is not finite, and keeps the last finite loss, as train_meta.py does."""
    meter = Meter()
    with Interrupt() as interrupt:
        for number in range(steps):
            result = step()
            meter.add(number, result.finite, {"loss": result.loss, **result.telemetry})
            interrupt()
        meter.check()
        meter.read(lambda tensors: tensors)


def unguarded(step, steps):
    """The same telemetry, and an update whatever the numbers are."""
    total = 0
    with patch("metasemi.step.update_if", lambda finite, optimizer: optimizer.step()), \
         patch("metasemi.step.get_total_norm", lambda tensors: torch.zeros(())):
        for _ in range(steps):
            result = step()
            total = total + torch.stack([result.loss, *result.telemetry.values()])
        total.tolist()


def compare(name, without, with_, turns):
    times = take_turns({"without": without, "with": with_}, turns).values()
    a, b = (1000 * statistics.median(side) for side in times)
    print(f"| {name} | {a:.4g} | {b:.4g} | {statistics.median(y / x for x, y in zip(*times)):.3f} |", flush=True)


if __name__ == "__main__":
    main()
