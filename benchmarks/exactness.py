"""How far the paper's finite difference is from the exact meta-gradient in the course of training.

    python3 benchmarks/exactness.py images/exactness.png

Three narrow networks train with the exact meta-gradient on scikit-learn's digits with 50 labels, row "both".  Every 20 steps
the batch in hand is given to each of WAYS.  The error is ||d - e|| / ||e||, where e is the exact derivative in float64 at the
same weights.  Prints the medians over three parts of the training, and draws every error, with ||e|| in a row below.  Where the
network puts all images into one class with certainty, e is nearly zero, and an error relative to it says nothing.
"""
import argparse
import copy
from pathlib import Path

import torch
from matplotlib.figure import Figure
from measuring import NARROW, relative_error

from datasets import Batches, load_dataset, split_labels
from metasemi import learning_rate, meta_gradient, ramp, training_step

NETWORKS = {"ConvLarge, width 16": NARROW["convlarge"], "WideResNet-10-1": NARROW["wideresnet"],
            "Shake-Shake-8 (2x16d)": NARROW["shakeshake"]}
WAYS = {
    "finite difference, bfloat16": {"method": "finite-difference", "dtype": torch.bfloat16},
    "finite difference, float32": {"method": "finite-difference"},
    "exact, bfloat16": {"dtype": torch.bfloat16},
    "exact, float32": {},
}
EVERY = 20


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args(argv)

    third = max(1, args.steps // EVERY // 3)
    print(f"medians of the relative error, {args.batch_size} + {args.batch_size} digits a step, {args.steps} steps\n")
    print("| network | way | first third | second third | last third |\n|---|---|---|---|---|")
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(2, len(NETWORKS), sharex=True, sharey="row", height_ratios=(3, 1))
    for (axis, below), (name, build) in zip(axes.T, NETWORKS.items()):
        errors, norms = errors_in_training(build, args.steps, args.batch_size)
        steps = range(0, EVERY * len(norms), EVERY)
        for way, values in errors.items():
            thirds = [torch.tensor(part).median().item() for part in (values[:third], values[third:-third], values[-third:])]
            print(f"| {name} | {way} | " + " | ".join(f"{value:.1e}" for value in thirds) + " |", flush=True)
            axis.semilogy(steps, values, label=way, linewidth=1.2)
        below.semilogy(steps, norms, color="black", linewidth=1.2)
        axis.set_title(name, fontsize=10)
        below.set_xlabel("step")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("relative error of the meta-gradient")
    axes[1, 0].set_ylabel("its norm ||e||")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(args.picture, dpi=160)


def errors_in_training(build, steps, batch_size):
    """Returns way -> relative errors, and the norms of the exact meta-gradient, at every EVERY-th of some steps of training."""
    torch.manual_seed(1)
    images = load_dataset("digits", ".")
    labeled, unlabeled = split_labels(images.train_labels, 50, 10, seed=1)
    batches = Batches(images, labeled, unlabeled, batch_size=batch_size, seed=1, mixup_gamma=1.0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    errors, norms = {way: [] for way in WAYS}, []
    for step in range(1, steps + 1):
        x_l, y_l, x_u, _, lam = batches(step)
        if step % EVERY == 1:
            exact = meta_gradient(copy.deepcopy(model).double(), x_l.double(), y_l, x_u.double())[1]
            norms.append(exact.norm().item())
            for way, options in WAYS.items():
                found = meta_gradient(model, x_l, y_l, x_u, **options)[1].double()
                errors[way].append(relative_error(found, exact))
        alpha = learning_rate(step, 0.1, steps // 10, [steps * 3 // 4, steps * 7 // 8], 0.1)
        training_step(model, optimizer, x_l, y_l, x_u, alpha=alpha, beta=alpha, weight=ramp(step, steps // 10, 1.0), lam=lam)
    return errors, norms


if __name__ == "__main__":
    main()
