"""The paper's tables as data: the rows of the ablation, the settings of each cell, the published error rates."""
import shlex
from pathlib import Path
from typing import NamedTuple

from utils.cli import option
from utils.errors import UsageError, fail
from utils.flags import COMMAND, OF_META_STEP, command_line, parse_given, with_role


class TableRow(NamedTuple):
    """One training method that the tables compare."""

    title: str
    flags: tuple                    # of train_meta.py, which select the method
    forward_passes: int             # of one batch, in one step; a backward pass counts as two


ROWS = {
    "neither": TableRow("supervised baseline", ("--no-meta",), 3),
    "meta": TableRow("meta only", (), 12),
    "mix-up": TableRow("mix-up only", ("--no-meta", "--mix-up"), 4),
    "both": TableRow("MetaSemi", ("--mix-up",), 12),
    "beta-0": TableRow("MetaSemi, meta learning rate 0", ("--mix-up", "--meta-lr", "0"), 12),
    "finite-difference": TableRow("MetaSemi, finite difference", ("--mix-up", "--meta-gradient", "finite-difference"), 12),
    "supervised": TableRow("fully supervised", ("--no-meta",), 3),
}
ABLATION = ("neither", "meta", "mix-up", "both")
MAKE_ROWS = {"mix_up", "no_meta", "meta_lr"}            # flags that stand in the rows


class Cell(NamedTuple):
    """A data set with its number of labels, and the network and schedule that every row trains on it."""

    title: str
    flags: tuple                    # of train_meta.py, which select the data and what else differs from its defaults
    num_label: int
    num_train: int
    seed: int                       # the first one
    arch: str = "convlarge"
    batch_size: int = 128
    total_steps: int = 400_000
    milestones: tuple = (300_000, 350_000)      # empty with a cosine schedule
    warmup: int = 4000
    test_freq: int = 400
    ramp: int | None = None         # steps of ramp of the consistency loss; None: as many as of warm-up
    lr: float | None = None         # None: the default
    start: tuple = ()               # (cell, row) whose weights it starts from; empty: random ones
    macs: float = 731.4e6           # multiply-accumulate operations of one forward pass of one image
    baseline: dict = {}             # the fields that differ for the row "neither": name -> value
    published: dict = {}            # row -> error rate in percent

    @property
    def data_name(self):
        """The data set in the names of split files.  CIFAR-10 has two: its JPEG files come in another order."""
        return "cifar10-jpeg" if self.flags[1] == "folder" else self.flags[1]


SMALL = {"arch": "convsmall", "batch_size": 64, "total_steps": 5000, "milestones": (3750, 4375), "warmup": 200,
         "test_freq": 250, "macs": 11.8e6}
JPEG = ("--dataset", "folder", "--data-path", "data/cifar10-images", "--flip")
# This network fits its few labels completely, as the networks of the paper do.
FEW = {"arch": "convnarrow", "batch_size": 64, "total_steps": 2000, "milestones": (1500, 1750), "warmup": 80, "test_freq": 250,
       "macs": 11.2e6}
LONG = FEW | {"total_steps": 8000, "milestones": (6000, 7000)}
AT_16 = (*JPEG, "--image-size", "16")
CELLS = {
    "svhn": Cell("SVHN, 1,000 labels", ("--dataset", "svhn", "--alpha", "0.1", "--weight-decay", "5e-5"), 1000, 73_257, 7788,
                 published={"neither": 9.76, "meta": 3.68, "mix-up": 5.60, "both": 3.15, "supervised": 2.67}),
    "cifar10": Cell("CIFAR-10, 4,000 labels", ("--dataset", "cifar10"), 4000, 50_000, 8469,
                    published={"neither": 15.43, "meta": 11.63, "mix-up": 11.10, "both": 7.78, "supervised": 4.88}),
    "cifar100": Cell("CIFAR-100, 10,000 labels", ("--dataset", "cifar100"), 10_000, 50_000, 7788,
                     published={"neither": 38.74, "meta": 35.40, "mix-up": 32.67, "both": 30.74, "supervised": 22.10}),
    "cifar10-small": Cell("CIFAR-10, 4,000 labels, small network", ("--dataset", "cifar10"), 4000, 50_000, 1, **SMALL),
    "cifar10-jpeg-small": Cell("CIFAR-10 (JPEG), 4,000 labels, small network", JPEG, 4000, 50_000, 1, **SMALL),
    **{f"cifar10-jpeg-{count}": Cell(f"CIFAR-10 (JPEG) at 16x16, {count:,} labels", AT_16, count, 50_000, 11, **FEW)
       for count in (250, 500, 1000)},
    "cifar10-jpeg-500-long": Cell("CIFAR-10 (JPEG) at 16x16, 500 labels, 8,000 steps", AT_16, 500, 50_000, 11, **LONG),
    # The long cell until its decay, and what comes after from the weights of either row.
    "cifar10-jpeg-500-start": Cell("CIFAR-10 (JPEG) at 16x16, 500 labels, 8,000 steps: the first 6,000", AT_16, 500, 50_000, 11,
                                   **LONG | {"total_steps": 6000}),
    **{f"cifar10-jpeg-500-from-{row}": Cell(f"CIFAR-10 (JPEG) at 16x16, 500 labels: 2,000 steps from the weights of "
                                            f"{ROWS[row].title} at step 6,000", AT_16, 500, 50_000, 11, lr=0.01,
                                            start=("cifar10-jpeg-500-start", row),
                                            **LONG | {"total_steps": 2000, "milestones": (1000,), "warmup": 0})
       for row in ("both", "mix-up")},
    "cifar10-jpeg-long": Cell("CIFAR-10 (JPEG), 4,000 labels, 20,000 steps", (*JPEG, "--precision", "bfloat16"), 4000,
                              50_000, 11, "convnarrow", 64, 20_000, (15_000, 17_500), 200, 1000, macs=46.4e6),
    "imagenet": Cell("ImageNet, 10 % of the labels, top-1", ("--dataset", "imagenet", "--data-path", "data/imagenet",
                                                             "--schedule", "cosine", "--sync-bn", "--precision",
                                                             "bfloat16"), 128_000, 1_281_167, 1234,
                     "resnet18", 512, 1_351_200, (), 11_260, 2252, ramp=0, macs=1.82e9,
                     baseline={"total_steps": 150_000, "warmup": 1250},     # as many epochs, of the labeled images
                     published={"neither": 53.65, "both": 44.87, "supervised": 29.15}),
    "digits": Cell("digits, 50 labels", ("--dataset", "digits"), 50, 1297, 1, "convsmall", 64, 800, (600, 700), 80, 100,
                   macs=2.85e6),
}


def scaled(count, scale):
    return max(1, round(count * scale))


def cell_of(name, row):
    """Returns the cell as a row of the ablation trains it."""
    cell = CELLS[name]
    return cell._replace(**cell.baseline) if row == "neither" else cell


def folder_of(cell, row, seed, scale):
    return Path("results", "reproduce", f"{cell}-{scale:g}", f"{row}-{seed}")


def training_flags(name, row, seed, scale):
    """Returns the flags of train_meta.py for one run of a cell; scale multiplies steps, milestones, warm-up and --test-freq."""
    cell = cell_of(name, row)
    steps, milestones = scaled(cell.total_steps, scale), [scaled(m, scale) for m in cell.milestones]
    if len(set(milestones)) < len(milestones):
        raise UsageError(f"argument --scale: {scale:g} leaves no step between the milestones of {name}: give more")
    more = {"--batch-size": cell.batch_size, "--total-steps": steps, "--milestones": ",".join(map(str, milestones)) or None,
            "--ramp": None if "--no-meta" in ROWS[row].flags else cell.ramp, "--lr": cell.lr,
            "--init": folder_of(*cell.start, seed, scale) / "checkpoint.pth" if cell.start else None,
            "--warmup": scaled(cell.warmup, scale) if cell.warmup else 0, "--test-freq": scaled(cell.test_freq, scale),
            "--print-freq": min(100, scaled(steps, 0.05)), "--seed": seed}
    return [*cell.flags, "--num-label", str(cell.num_train if row == "supervised" else cell.num_label), "-a", cell.arch,
            *ROWS[row].flags, *(str(word) for flag, value in more.items() if value is not None for word in (flag, value))]


def own_flags(text):
    """Returns the flags in a text that is split as a shell would, name -> value: an experiment of the user's own.

    Raises UsageError for one that train_meta.py does not take, that makes a row, or that reproduce.py gives itself.
    """
    def refuse(prog, message, code):
        raise ValueError(message)

    try:
        given = vars(parse_given(shlex.split(text), refuse)[1])
    except ValueError as error:
        raise UsageError(f"argument --flags: {text[:80]!r}: {error}") from None
    if not given:
        raise UsageError("argument --flags: it holds no flag: name the data at least")
    if odd := next((name for name in given if name in MAKE_ROWS | {"seed"} | with_role(COMMAND)), None):
        raise UsageError(f"argument --flags: {option(odd)} is given to each run by reproduce.py: leave it out")
    return given


def flags_of_row(own, row, seed):
    """Returns the flags of train_meta.py for one run of an experiment of the user's own; without those that its row ignores."""
    ignored = {*OF_META_STEP} if "--no-meta" in ROWS[row].flags else set()
    ignored |= {"include_labeled"} if row == "neither" else set()
    flags = {name: value for name, value in own.items() if name not in ignored}
    return [*command_line(flags), *ROWS[row].flags, "--seed", str(seed)]


def training_flop(name, row, scale):
    """Returns the floating-point operations of the training steps of one run."""
    cell = cell_of(name, row)
    return 2 * cell.macs * cell.batch_size * ROWS[row].forward_passes * scaled(cell.total_steps, scale)


def row_of(flags):
    """Returns the row of a run with these resolved flags: of those whose flags it has, the one with the most of them."""
    own = {name: vars(parse_given(row.flags, fail)[1]).items() for name, row in ROWS.items()}
    return max((name for name in ROWS if own[name] <= flags.items()), key=lambda name: len(own[name]))


def published_error(flags):
    """Returns the published error rate in percent of a run with these resolved flags, or None."""
    return next((cell.published.get(row_of(flags)) for cell in CELLS.values() if cell.published
                 and (cell.flags[1], cell.num_label) == (flags["dataset"], flags["num_label"])), None)
