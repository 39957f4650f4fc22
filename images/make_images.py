"""Draws formulation.png and step.png from the texts below.

    python3 images/make_images.py
"""
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
INK, BLUE, RED = "#1a1a1a", "#1f5f99", "#b3261e"


def draw_formulation(ax):
    ax.text(0, 3.45, "MetaSemi as bi-level optimization", weight="bold", fontsize=15, va="top")
    ax.text(0.3, 2.55, r"$\min_{\mathcal{Y}}\ \ \sum_k\ L(x^l_k,\, y_k;\ \theta^*(\mathcal{Y}))$", fontsize=21, color=BLUE)
    ax.text(6.4, 2.55, "outer: the pseudo-labels that\nserve the labeled images best", fontsize=12, color=BLUE, va="center")
    inner = r"$\mathrm{s.t.}\ \ \theta^*(\mathcal{Y}) = \mathrm{arg\,min}_{\theta}\ \sum_i\ L(x^u_i,\, y_i;\ \theta)$"
    ax.text(0.3, 1.45, inner, fontsize=21, color=RED)
    ax.text(6.4, 1.45, "inner: the network that fits\nthe pseudo-labels", fontsize=12, color=RED, va="center")
    ax.text(0, 0.35, "Online, one virtual SGD step stands for the inner problem:   "
            r"$\tilde{\theta} = \theta - \alpha\, g_u = \theta$,   yet   $\partial \tilde{\theta} / \partial \tilde{y} \neq 0$",
            fontsize=13)


def draw_step(ax):
    def box(x, y, width, text, color=INK):
        ax.add_patch(FancyBboxPatch((x, y - 0.39), width, 0.78, boxstyle="round,pad=0.02,rounding_size=0.1",
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


@matplotlib.rc_context({"mathtext.fontset": "cm", "font.size": 13})
def main():
    for draw, name, width, height in ((draw_formulation, "formulation", 9.6, 3.7), (draw_step, "step", 12.4, 5.0)):
        # A blank page measured in inches, which is white also where the reader's page is dark.
        fig = Figure(figsize=(width + 0.6, height + 0.4), facecolor="white")
        ax = fig.add_axes((0.3 / (width + 0.6), 0.2 / (height + 0.4), width / (width + 0.6), height / (height + 0.4)))
        ax.set(xlim=(0, width), ylim=(0, height))
        ax.axis("off")
        draw(ax)
        fig.savefig(HERE / f"{name}.png", dpi=130, bbox_inches="tight", pad_inches=0.2, metadata={"Software": None})


if __name__ == "__main__":
    main()
