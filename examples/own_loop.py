"""MetaSemi in a loop of your own: AdamW with a schedule, three unlabeled images to each labeled one, and an EMA copy.

    python3 examples/own_loop.py

The network learns scikit-learn's handwritten digits from 50 labels and 1,247 unlabeled images; 500 images are the test set.
"""
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.append(str(Path(__file__).resolve().parent.parent))        # the checkout: found there if metasemi is not installed
from metasemi import ramp, training_step  # noqa: E402


def main(steps=300):
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)     # (N, 1, 8, 8)
    x_train, y_train, x_test, y_test = x[:-500], y[:-500], x[-500:], y[-500:]
    labeled = torch.cat([torch.nonzero(y_train == k)[:5, 0] for k in range(10)])
    x_labeled, y_labeled = x_train[labeled], y_train[labeled]
    x_unlabeled = x_train[~torch.isin(torch.arange(len(x_train)), labeled)]

    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)

    for step in range(1, steps + 1):
        i, j = torch.randint(len(x_labeled), (32,)), torch.randint(len(x_unlabeled), (96,))
        lam = torch.distributions.Beta(1.0, 1.0).sample((96,))                  # without mix-up: lam=None
        training_step(model, optimizer, x_labeled[i], y_labeled[i], x_unlabeled[j], beta=0.1, weight=ramp(step, steps // 4),
                      lam=lam)
        scheduler.step()
        averaged.update_parameters(model)

    for name, network in (("last weights", model), ("averaged weights", averaged)):
        with torch.no_grad():
            accuracy = (network.eval()(x_test).argmax(dim=1) == y_test).float().mean()
        print(f"test accuracy, {name}: {accuracy:.1%}")


if __name__ == "__main__":
    main()
