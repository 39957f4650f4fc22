"""Two moons with three labels each: what the supervised baseline and MetaSemi learn, and what the meta-gradient moves.

    python3 examples/two_moons.py images/two_moons.png

Prints the accuracy on the unlabeled points, also that of MetaSemi with a meta learning rate of 0: there the consistency loss
under noise works alone.
"""
import argparse
import sys
from pathlib import Path

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent))        # the checkout: found there if metasemi is not installed
from metasemi import meta_gradient, ramp, training_step, update_pseudo_labels  # noqa: E402

NOISE, BETA, WEIGHT = 0.2, 0.1, 5.0         # of the second view, the meta step, and the consistency loss
COLORS, INK = ["#1f5f99", "#d1603d"], "#1a1a1a"             # of the upper and the lower moon, of the text
SHADES = LinearSegmentedColormap.from_list("moons", [COLORS[0], "#ffffff", COLORS[1]])


def train(x_l, y_l, x_u, seed, steps, meta=True, beta=BETA, share=1.0):
    """The network after a share of the steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, max(1, round(share * steps)) + 1):
        strong = x_u + NOISE * torch.randn_like(x_u) if meta else None
        training_step(model, optimizer, x_l, y_l, x_u, x_u_strong=strong, beta=beta, weight=ramp(step, steps // 4, WEIGHT),
                      meta=meta)
        scheduler.step()
    return model


@torch.no_grad()
def accuracy(model, x, y):
    return (model(x).argmax(dim=1) == y).float().mean().item()


@torch.no_grad()
def draw(baseline, early, metasemi, x_l, y_l, x_u, y_u, picture):
    x = torch.cat([x_l, x_u])
    (left, bottom), (right, top) = (x.min(dim=0).values - 0.35).tolist(), (x.max(dim=0).values + 0.35).tolist()
    u, v = torch.meshgrid(torch.linspace(left, right, 300), torch.linspace(bottom, top, 300), indexing="xy")
    fig = Figure(figsize=(15, 3.85), facecolor="white", layout="constrained")
    axes = fig.subplots(1, 3)
    for ax, model, title in ((axes[0], baseline, f"supervised: {accuracy(baseline, x_u, y_u):.1%} right"),
                             (axes[1], early, "early on: the meta step moves the pseudo-labels"),
                             (axes[2], metasemi, f"MetaSemi: {accuracy(metasemi, x_u, y_u):.1%} right")):
        p = model(torch.stack([u, v], dim=-1).view(-1, 2)).softmax(dim=1)[:, 1].view(300, 300).numpy()      # of the lower moon
        ax.imshow(p, extent=(left, right, bottom, top), origin="lower", cmap=SHADES, vmin=0, vmax=1, alpha=0.45)
        ax.contour(u.numpy(), v.numpy(), p, levels=[0.5], colors=INK, linewidths=1.4)
        ax.scatter(*x_u.T.numpy(), s=9, c=[COLORS[k] for k in y_u], linewidths=0, alpha=0.35 if model is early else 0.85)
        ax.set_title(title, fontsize=14, color=INK)
    with torch.enable_grad():
        y_tilde, gradient = meta_gradient(early, x_l, y_l, x_u)
    moved = (update_pseudo_labels(y_tilde, gradient, BETA) - y_tilde)[:, 0].numpy()         # towards the upper moon
    length = 0.5 * moved / max(abs(moved).max(), 1e-12)
    axes[1].quiver(*x_u.T.numpy(), 0 * length, length, color=[COLORS[int(m < 0)] for m in moved], angles="xy",
                   scale_units="xy", scale=1, width=0.003, headwidth=4, headlength=5, headaxislength=4.5, minlength=0, zorder=2)
    for ax in axes:
        for k, color in enumerate(COLORS):
            ax.scatter(*x_l[y_l == k].T.numpy(), s=170, marker="*", color=color, edgecolors="white", linewidths=1.2, zorder=3)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    fig.savefig(picture, dpi=130, metadata={"Software": None} if str(picture).endswith(".png") else None)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", default="two_moons.png")
    parser.add_argument("--seed", type=int, default=0, help="of the points, the labels and the weights")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args(argv)
    points, moons = make_moons(500, noise=0.1, random_state=args.seed)
    x, y = torch.tensor(points, dtype=torch.float32), torch.tensor(moons)
    generator = torch.Generator().manual_seed(args.seed)
    labeled = torch.cat([torch.nonzero(y == k)[torch.randperm(250, generator=generator)[:3], 0] for k in (0, 1)])
    unlabeled = ~torch.isin(torch.arange(len(x)), labeled)
    data = x[labeled], y[labeled], x[unlabeled]
    baseline = train(*data, args.seed, args.steps, meta=False)
    consistency = train(*data, args.seed, args.steps, beta=0.0)
    early = train(*data, args.seed, args.steps, share=0.02)             # before the arrows
    metasemi = train(*data, args.seed, args.steps)
    for name, model in (("supervised", baseline), ("MetaSemi", metasemi), ("MetaSemi, beta = 0", consistency)):
        print(f"{name}: {accuracy(model, x[unlabeled], y[unlabeled]):.1%}")
    draw(baseline, early, metasemi, *data, y[unlabeled], args.picture)


if __name__ == "__main__":
    main()
