"""Writes the tables of method.md and usage.md that follow from the source: the lines of Algorithm 2, and the flags.

    python3 docs/make_tables.py
"""
import sys
from argparse import SUPPRESS
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
from plot_features import plotting_parser  # noqa: E402
from reproduction.report import filled, markdown  # noqa: E402
from utils.flags import training_parser  # noqa: E402

# Algorithm 2, line by line: its number, what it does, and the file and a part of the one source line that does it.
ALGORITHM = [
    ("1-2", "Sample `B` labeled images `(x_l, y_l)` and `B` unlabeled images `x_u`.", "train_meta.py", "# lines 1, 2, 9"),
    ("3", "`y_tilde = f(x_u; theta)`", "metasemi/gradient.py", "return consistency.inverse(linked)"),
    ("4", "`L_l` is the mean of `KL(f(x_l; theta), y_l)`.", "metasemi/gradient.py", "logits_l = logits(model, theta"),
    ("5", "`g` is the gradient of `L_l` with respect to `theta`.", "metasemi/gradient.py", "g = gradient_of(loss_l, theta)"),
    ("6", "`eps = 0.01 / norm(g)`; only the finite difference needs it.", "metasemi/gradient.py", "# line 6"),
    ("7", "The meta-gradient is `2 J g`, exactly; the paper takes a central difference.", "metasemi/gradient.py",
     "forward_ad.unpack_dual(consistency.link(logits_u))"),
    ("8", "`y_hat = y_tilde - beta * 2 J g`, clipped at zero, each row divided by its sum.", "metasemi/pseudo_labels.py",
     "y_hat = (y_tilde - beta"),
    ("9", "Draw `lam ~ Beta(gamma, gamma)`, one for each sample.", "datasets/sampling.py", ".beta(gamma, gamma"),
    ("10-11", "`x_in` and `y_in` are `lam * (x_l, y_l) + (1 - lam) * (x_u, y_hat)`.", "metasemi/pseudo_labels.py",
     "return lam_x * x_l"),
    ("12", "`L_cls = KL(f(x_in; theta), y_in)`", "metasemi/step.py", "# line 12"),
    ("13", "`L_cons = MSE(f(x_u; theta), y_hat)`", "metasemi/step.py", "# line 13"),
    ("14", "Take the gradient of `L_cls + w * L_cons` with respect to `theta`.", "metasemi/step.py", "# line 14"),
    ("15", "Make one SGD step with the learning rate `alpha`.", "metasemi/step.py", "# line 15"),
]


def locate(file, part):
    """A link to the one source line that holds a text; ValueError if there is none, or more."""
    numbers = [i for i, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), start=1) if part in line]
    if len(numbers) != 1:
        raise ValueError(f"{file} has {len(numbers)} lines that hold {part!r}")
    return f"[{file}:{numbers[0]}](../{file}#L{numbers[0]})"


def flag_tables(parser):
    """The flags of a parser with the words of its help, a table for each group."""
    tables = []
    for group in parser._action_groups:
        rows = [flag_row(parser, action) for action in group._group_actions
                if action.dest != "help" and action.help != SUPPRESS]
        if rows:
            tables.append(markdown([f"flags: {group.title}", "meaning"], rows))
    return "\n\n".join(tables)


def flag_row(parser, action):
    value = "" if action.nargs == 0 else action.metavar or f"{{{','.join(action.choices)}}}"
    value = {"+": f"{value} ...", "?": f"[{value}]"}.get(action.nargs, value)
    *short, last = action.option_strings
    return [", ".join(f"`{name}`" for name in [*short, f"{last} {value}".rstrip()]),
            action.help % {**vars(action), "prog": parser.prog}]


def blocks():
    rows = [[number, text, locate(file, part)] for number, text, file, part in ALGORITHM]
    return {"algorithm": markdown(["line", "what it does", "where"], rows), "training-flags": flag_tables(training_parser()),
            "plotting-flags": flag_tables(plotting_parser())}


def main():
    for path in (HERE / "method.md", HERE / "usage.md"):
        path.write_text(filled(path, blocks()), encoding="utf-8")


if __name__ == "__main__":
    main()
