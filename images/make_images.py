"""Draws formulation.png, algorithm.png and step.png, from the texts below and the lines of the source they speak of.

    python3 images/make_images.py
"""
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")       # no display is needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent
plt.rcParams.update({"mathtext.fontset": "cm", "font.size": 13})
INK, BLUE, RED, GREY = "#1a1a1a", "#1f5f99", "#b3261e", "#666666"

# Algorithm 2, line by line: its number, what it does, and the file and the beginning of the source line that does it.
ALGORITHM = [
    ("1-2", r"sample $B$ labeled $(x^l, y)$ and $B$ unlabeled $x^u$", "train_meta.py",
     "x_l, y_l, x_u, hidden, lam = batches(step)"),
    ("3", r"$\tilde{y} = f(x^u; \theta)$", "metasemi/meta_gradient.py", "y_tilde, J_g = forward_ad"),
    ("4", r"$L^l = \frac{1}{B} \sum_k \Phi^{KL}(f(x^l_k; \theta),\, y_k)$", "metasemi/meta_gradient.py",
     "logits_l = logits(model, theta, x_l"),
    ("5", r"$g = \nabla_\theta\, L^l$", "metasemi/meta_gradient.py", "g = torch.autograd.grad(cross_entropy"),
    ("6", r"$\epsilon = 0.01 \,/\, \|g\|_2$   (finite difference only)", "metasemi/meta_gradient.py", "half_step = epsilon"),
    ("7", r"$\nabla\tilde{y} = 2\, J g$   (exact; the paper: a central difference)",
     "metasemi/meta_gradient.py", "return y_tilde, 2 * J_g"),
    ("8", r"$\hat{y} = \tilde{y} - \beta\, \nabla\tilde{y}$, clipped at 0, rows over their sum",
     "metasemi/pseudo_labels.py", "y_hat = (y_tilde - beta"),
    ("9", r"$\lambda \sim \mathrm{Beta}(\gamma, \gamma)$, one per sample",
     "datasets/sampling.py", 'return generator(seed, "mix-up", step).beta'),
    ("10-11", r"$x^{in}, y^{in} = \lambda\, (x^l, y) + (1 - \lambda)\, (x^u, \hat{y})$",
     "metasemi/pseudo_labels.py", "return lam_x * x_l"),
    ("12", r"$L_{cls} = \Phi^{KL}(f(x^{in}; \theta),\, y^{in})$", "metasemi/step.py", "loss = kl_divergence("),
    ("13", r"$L_{cons} = \Phi^{MSE}(f(x^u; \theta),\, \hat{y})$", "metasemi/step.py", "loss_cons = CONSISTENCY"),
    ("14", r"$\nabla_\theta\, (L_{cls} + w\, L_{cons})$", "metasemi/step.py", "loss.backward()"),
    ("15", r"one SGD step with learning rate $\alpha$", "metasemi/step.py", "optimizer.step()"),
]


def locate(file, beginning):
    """"file:line" of the one source line that begins so; ValueError if there is none, or more."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [i + 1 for i, line in enumerate(lines) if line.strip().startswith(beginning)]
    if not found or (len(found) > 1 and beginning != "optimizer.step()"):
        raise ValueError(f"{file} has {len(found)} lines that begin with {beginning!r}")
    return f"{file}:{found[0]}"


def algorithm_rows():
    return [(number, text, locate(file, beginning)) for number, text, file, beginning in ALGORITHM]


def draw_formulation():
    fig, ax = canvas(9.6, 3.7)
    ax.text(0, 3.45, "MetaSemi as bi-level optimization", weight="bold", fontsize=15, va="top")
    ax.text(0.3, 2.55, r"$\min_{\mathcal{Y}}\ \ \sum_k\ L(x^l_k,\, y_k;\ \theta^*(\mathcal{Y}))$", fontsize=21, color=BLUE)
    ax.text(6.4, 2.55, "outer: the pseudo-labels that\nserve the labeled images best", fontsize=12, color=BLUE, va="center")
    inner = r"$\mathrm{s.t.}\ \ \theta^*(\mathcal{Y}) = \mathrm{arg\,min}_{\theta}\ \sum_i\ L(x^u_i,\, y_i;\ \theta)$"
    ax.text(0.3, 1.45, inner, fontsize=21, color=RED)
    ax.text(6.4, 1.45, "inner: the network that fits\nthe pseudo-labels", fontsize=12, color=RED, va="center")
    ax.text(0, 0.35, "Online, one virtual SGD step stands for the inner problem:   "
            r"$\tilde{\theta} = \theta - \alpha\, g_u = \theta$,   yet   $\partial \tilde{\theta} / \partial \tilde{y} \neq 0$",
            fontsize=13)
    save(fig, "formulation", "")


def draw_algorithm():
    rows = algorithm_rows()
    height = 0.46 * len(rows) + 1.0
    fig, ax = canvas(11.0, height)
    ax.text(0, height - 0.1, "Algorithm 2, as this code runs it", weight="bold", fontsize=15, va="top")
    for i, (number, text, place) in enumerate(rows):
        y = height - 0.95 - 0.46 * i
        ax.text(0.55, y, number, ha="right", va="center", color=GREY)
        ax.text(0.8, y, text, va="center", fontsize=14)
        ax.text(7.3, y, place, va="center", family="monospace", fontsize=11.5, color=BLUE)
    ax.hlines(height - 0.58, 0, 11.0, color=INK, linewidth=1)
    save(fig, "algorithm", describe(rows))


def describe(rows):
    """What algorithm.png says, kept in the file so that a test can see when it is out of date."""
    return "; ".join(f"{number} {place}" for number, _, place in rows)


def draw_step():
    fig, ax = canvas(12.4, 5.0)

    def box(x, y, width, text, color=INK, height=0.78):
        ax.add_patch(FancyBboxPatch((x, y - height / 2), width, height, boxstyle="round,pad=0.02,rounding_size=0.1",
                                    facecolor="white", edgecolor=color, linewidth=1.6))
        ax.text(x + width / 2, y, text, ha="center", va="center", color=color, fontsize=12.5, linespacing=1.35)

    def arrow(start, end, color=INK, bend=0.0):
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.4, "shrinkA": 0,
                                                "shrinkB": 0, "connectionstyle": f"arc3,rad={bend}"})

    ax.text(0, 4.9, "The data flow of one step", weight="bold", fontsize=15, va="top")
    ax.text(4.15, 4.4, "evaluation mode", ha="center", color=BLUE, fontsize=12.5)
    ax.text(9.1, 4.4, "training mode", ha="center", color=RED, fontsize=12.5)
    box(0.05, 3.5, 1.35, r"$x^l,\ y$")
    box(0.05, 1.5, 1.35, r"$x^u$")
    box(2.0, 3.5, 1.9, "gradient\n" + r"$g = \nabla_\theta L^l$", BLUE)
    box(2.0, 1.5, 1.9, "one JVP\n" + r"$f(x^u),\ J g$", BLUE)
    box(4.5, 1.5, 1.9, "meta step\n" + r"$\hat{y} = \tilde{y} - 2\beta\, J g$", BLUE)
    box(6.9, 3.5, 1.7, "mix-up\n" + r"$x^{in},\ y^{in}$", RED)
    box(9.1, 3.5, 1.3, r"$L_{cls}$" + "\nKL", RED)
    box(9.1, 1.5, 1.3, r"$w\, L_{cons}$" + "\nMSE", RED)
    box(10.9, 2.5, 1.4, "SGD step\n" + r"$\theta \leftarrow \theta - \alpha \nabla$", RED)
    arrow((1.42, 3.5), (1.98, 3.5))
    arrow((1.42, 1.5), (1.98, 1.5))
    arrow((2.95, 3.08), (2.95, 1.92), BLUE)
    ax.text(3.05, 2.5, r"$g$", color=BLUE)
    arrow((3.92, 1.5), (4.48, 1.5), BLUE)
    arrow((6.42, 1.5), (9.08, 1.5))
    ax.text(7.2, 1.62, r"$\hat{y}$, detached", fontsize=12)
    arrow((6.2, 1.92), (7.3, 3.08))
    ax.text(7.0, 2.4, r"$x^u,\ \hat{y}$", fontsize=12)
    arrow((0.7, 3.92), (7.75, 3.92), bend=-0.07)
    arrow((0.7, 1.08), (9.75, 1.08), bend=0.1)
    ax.text(5.2, 0.72, r"$x^u$ again", fontsize=12)
    arrow((8.62, 3.5), (9.08, 3.5), RED)
    arrow((10.42, 3.4), (10.88, 2.8), RED)
    arrow((10.42, 1.6), (10.88, 2.2), RED)
    save(fig, "step", "")


def canvas(width, height):
    """A blank white page measured in inches: white also where the reader's page is dark."""
    fig = plt.figure(figsize=(width + 0.6, height + 0.4), facecolor="white")
    ax = fig.add_axes((0.3 / (width + 0.6), 0.2 / (height + 0.4), width / (width + 0.6), height / (height + 0.4)))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return fig, ax


def save(fig, name, description):
    fig.savefig(HERE / f"{name}.png", dpi=130, bbox_inches="tight", pad_inches=0.2,
                metadata={"Software": None, "Description": description})
    plt.close(fig)


def main():
    draw_formulation()
    draw_algorithm()
    draw_step()


if __name__ == "__main__":
    sys.exit(main())
