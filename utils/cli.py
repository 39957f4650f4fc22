"""Command lines: types that say which value was given, which rule it breaks and what to do; one line, exit code 2.

No value is evaluated, no flag may be abbreviated, and nothing here loads torch: a wrong flag answers at once.
"""
import argparse
import io
import math
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from utils.files import printable

LAST = "last"       # --resume without a path
ANSWERED = ("dataset", "data_path", "arch", "image_size", "precision", "num_label")    # by --split or a checkpoint
EVALUATING = ("evaluate", "predictions", "dataset", "data_path", "arch", "image_size", "precision", "device", "num_workers",
              "skip_corrupt")           # the flags that --evaluate uses
MOST = 10 ** 12                         # the bound of whole numbers without one of their own: all of them are exact as floats
LONGEST_NAME, LONGEST_PATH = 255, 3840  # bytes; Linux takes 255 and 4,095, and files with names of their own come below


class UsageError(ValueError):
    """Something given cannot be used as it is: one line with what, why and the remedy; the program exits with code 2."""


def one_line(message):
    return printable(" ".join(str(message).split()))


def fail(prog, message, code):
    """One line on standard error, then out."""
    print(f"{prog}: {one_line(message)}", file=sys.stderr)
    raise SystemExit(code)


def processes():
    """(rank, local rank, size): which of how many processes of one run this is, as torchrun says in the environment; else
    (0, 0, 1).  Raises UsageError for an environment that is neither."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 0, 0, 1
    given = [os.environ.get("RANK", ""), os.environ.get("LOCAL_RANK", "0"), size, os.environ.get("MASTER_PORT", "")]
    numbers = [int(text) for text in given if re.fullmatch("[0-9]{1,9}", text)]
    if len(numbers) < 4 or numbers[0] >= numbers[2] or not os.environ.get("MASTER_ADDR"):
        raise UsageError(f"WORLD_SIZE={size[:20]!r} in the environment is not as torchrun sets it, with RANK, MASTER_ADDR and "
                         "MASTER_PORT: start with torchrun, or unset it")
    return tuple(numbers[:3])


class Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    fail = staticmethod(fail)

    def error(self, message):
        self.fail(self.prog, f"{message} (usage: {self.prog} --help)", 2)


def number(kind, low=None, high=None, above=None, below=None):
    """An argparse type: a finite number of a kind (int or float) within closed (low, high) or open bounds.

    A whole number is at most MOST unless `high` says otherwise.
    """
    if kind is int and high is None:
        high = MOST
    rule = " and ".join(f"{words} {bound:g}" for words, bound in
                        (("at least", low), ("at most", high), ("above", above), ("below", below)) if bound is not None)
    noun = "a whole number" if kind is int else "a number"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not {noun}: give one {rule}") from None
        if not ((low is None or value >= low) and (high is None or value <= high)
                and (above is None or value > above) and (below is None or value < below) and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text[:80]} is out of range: give {noun} {rule}")
        return value
    return parse


def path(text):
    """An argparse type: a path that is short enough for the system, with room for the files that are written under it."""
    if len(os.fsencode(text)) > LONGEST_PATH or any(len(os.fsencode(name)) > LONGEST_NAME for name in text.split("/")):
        raise argparse.ArgumentTypeError(f"{text[:80]!r}... is too long: give a path of at most {LONGEST_PATH} bytes, and at "
                                         f"most {LONGEST_NAME} between two slashes")
    return Path(text)


def folder(text):
    """An argparse type: a path that names a folder of its own, not the current one by a variable that is empty."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: name a folder")
    return path(text)


def parse_milestones(texts):
    """"[300000, 350000]", "300000,350000", ["300000", "350000"] or the list itself to [300000, 350000]; evaluates nothing.

    Raises ValueError unless the steps are whole, positive and ascending.
    """
    text = texts if isinstance(texts, str) else " ".join(map(str, texts))
    body = text.strip()
    if body.startswith("[") and body.endswith("]"):
        body = body[1:-1].strip()
    if not re.fullmatch(r"([0-9]{1,15}(\s*,\s*|\s+))*([0-9]{1,15})?", body, re.ASCII):
        raise ValueError(f"{text[:80]!r} is not a list of steps: write \"[300000, 350000]\" or 300000,350000")
    steps = [int(part) for part in re.findall("[0-9]+", body)]
    if any(step == 0 for step in steps) or steps != sorted(set(steps)):
        raise ValueError(f"{text[:80]!r} is not ascending from at least 1: write \"[300000, 350000]\"")
    return steps


def network(networks):
    """An argparse type: the name of one of `networks`, or FILE:CLASS."""
    def parse(text):
        file, _, name = text.rpartition(":")
        if text not in networks and not (file and name.isidentifier()):
            raise argparse.ArgumentTypeError(f"{text!r} is no network: choose from {', '.join(networks)}, or name a class in "
                                             "a file of your own, path/to/net.py:Net")
        return text
    return parse


def training_parser(datasets, networks):
    """The flags of train_meta.py; datasets and networks are the names to choose from."""
    parser = Parser(
        prog="train_meta.py",
        description="Train MetaSemi, or one of the other rows of the paper's ablation.",
        epilog="rows of the ablation:  MetaSemi: --mix-up   meta only: (neither flag)   mix-up only: --no-meta --mix-up   "
               "supervised: --no-meta")
    count, positive = number(int, low=1), number(float, above=0)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=datasets, default="cifar10", help="data set (default: %(default)s)")
    data.add_argument("--data-path", default="./data", type=path, metavar="DIR",
                      help="where its files lie or are downloaded to (default: ./data)")
    data.add_argument("--num-label", default=4000, type=count, metavar="N",
                      help="labeled images, class-balanced; as many as there are training images: all (default: %(default)s)")
    data.add_argument("--split", type=path, metavar="FILE",
                      help="instead of a choice by the seed: the labeled images, an index a line as in label_indices.txt")
    data.add_argument("--num-val", default=0, type=number(int, low=0), metavar="N",
                      help="training images held out to select model_best.pth; 0: the test set selects (default: 0)")
    data.add_argument("--include-labeled", action="store_true", help="put the labeled images in the unlabeled set too")
    data.add_argument("--image-size", type=number(int, low=16, high=1024), metavar="PIXELS",
                      help="--dataset folder and imagenet: images become squares of this size (default: 32; imagenet: 224)")
    data.add_argument("--flip", action="store_true", help="--dataset folder: random horizontal flips in training")
    data.add_argument("--num-workers", default=4, type=number(int, low=0, high=256), metavar="N",
                      help="--dataset folder and imagenet: processes that decode images (default: %(default)s)")
    data.add_argument("--skip-corrupt", action="store_true",
                      help="--dataset folder and imagenet: put the next readable image in the place of one that cannot be read")

    method = parser.add_argument_group("method")
    method.add_argument("-a", "--arch", type=network(networks), default="convlarge", metavar="NETWORK",
                        help=f"{', '.join(networks)}, or FILE:CLASS in a file of your own, which is executed, and never "
                             "because a checkpoint names it (default: %(default)s)")
    method.add_argument("--mix-up", action="store_true", help="mix labeled and unlabeled images (lines 9-12 of Algorithm 2)")
    method.add_argument("--alpha", default=1.0, type=positive, metavar="GAMMA",
                        help="the paper's gamma: mix-up weights ~ Beta(gamma, gamma) (default: %(default)s)")
    method.add_argument("--no-meta", action="store_true", help="no meta-gradient and no consistency loss")
    method.add_argument("--meta-gradient", choices=("jvp", "finite-difference", "unrolled"), default="jvp",
                        help="exact and fast, the paper's approximation, or double backward (default: %(default)s)")
    method.add_argument("--epsilon", default=1e-2, type=positive, metavar="X",
                        help="length of the half-step of finite-difference (default: %(default)s)")
    method.add_argument("--consistency", choices=("mse", "kl"), default="mse", help="consistency loss (default: %(default)s)")
    method.add_argument("--weight", default=1.0, type=number(float, low=0), metavar="W",
                        help="weight of the consistency loss after its ramp (default: %(default)s)")
    method.add_argument("--ramp", type=number(int, low=0), metavar="N",
                        help="steps of linear ramp of that weight; 0: none (default: as --warmup)")

    optimization = parser.add_argument_group("optimization")
    optimization.add_argument("--total-steps", default=400_000, type=count, metavar="N", help="updates (default: %(default)s)")
    optimization.add_argument("--batch-size", default=128, type=number(int, low=1, high=1_000_000), metavar="B",
                              help="labeled images a step, and as many unlabeled ones, in all processes together "
                                   "(default: %(default)s)")
    optimization.add_argument("--sync-bn", action="store_true",
                              help="under torchrun: batch normalization over the batches of all processes (default: each its "
                                   "own)")
    optimization.add_argument("--lr", default=0.1, type=positive, metavar="X",
                              help="learning rate alpha_t (default: %(default)s)")
    optimization.add_argument("--meta-lr", default=None, type=number(float, low=0), metavar="X",
                              help="fixed meta learning rate beta (default: beta_t is the current learning rate)")
    optimization.add_argument("--warmup", default=4000, type=number(int, low=0), metavar="N",
                              help="steps of linear warm-up of the learning rate (default: %(default)s)")
    optimization.add_argument("--schedule", choices=("step", "cosine"), default="step",
                              help="after the warm-up: decay at --milestones, or a cosine to 0 at the last step "
                                   "(default: %(default)s)")
    optimization.add_argument("--milestones", default=[300_000, 350_000], nargs="+", metavar="STEP",
                              help='the learning rate decays after these steps (default: "[300000, 350000]"; "[]": never)')
    optimization.add_argument("--gamma", default=0.1, type=number(float, above=0, high=1), metavar="X",
                              help="learning-rate decay factor; not the paper's gamma (default: %(default)s)")
    optimization.add_argument("--momentum", default=0.9, type=number(float, low=0, below=1), metavar="X",
                              help="momentum of SGD (default: %(default)s)")
    optimization.add_argument("--weight-decay", default=1e-4, type=number(float, low=0), metavar="X",
                              help="weight decay, on every parameter (default: %(default)s)")
    optimization.add_argument("--seed", default=1234, type=number(int, low=0, high=2 ** 63 - 1), metavar="N",
                              help="of the split, the order, the augmentation and the weights (default: %(default)s)")
    optimization.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    optimization.add_argument("--precision", choices=("float32", "tf32", "bfloat16"), default="float32",
                              help="of the network's arithmetic; weights, losses and batch statistics stay float32 "
                                   "(default: %(default)s)")
    optimization.add_argument("--compile", action="store_true",
                              help="compile the meta-gradient jvp, equal up to rounding: pays for small networks on the CPU "
                                   "(convsmall: 1.1 times the steps a second; convlarge: none more); unmeasured on CUDA")

    run = parser.add_argument_group("bookkeeping")
    run.add_argument("--save-path", default=Path("./results/tmp"), type=folder, metavar="DIR",
                     help="run folder (default: ./results/tmp)")
    run.add_argument("--resume", nargs="?", const=LAST, metavar="PATH",
                     help="continue from this checkpoint; without PATH from the last one in --save-path, if there is one")
    run.add_argument("--overwrite", action="store_true", help="start afresh in a folder that holds a run")
    run.add_argument("--print-freq", default=100, type=count, metavar="N",
                     help="steps between log lines (default: %(default)s)")
    run.add_argument("--test-freq", default=400, type=count, metavar="N",
                     help="steps between evaluations, each followed by a checkpoint (default: %(default)s)")
    run.add_argument("--evaluate", type=path, metavar="PATH",
                     help="train nothing: measure this checkpoint, or state dict, on the test set; a checkpoint knows its "
                          "network and data, a state dict takes --dataset and --arch from the command line")
    run.add_argument("--predictions", type=path, metavar="FILE.csv", help="--evaluate: write the prediction for each image")
    return parser


def parse_training(argv, datasets, networks, check_num_label, fail=fail):
    """Resolved flags of train_meta.py; `milestones` is a list of ints.  Exits with code 2 on a contradiction.

    With --split, num_label is None unless it was given; with --evaluate, so is every flag that a checkpoint answers.
    fail: a function as `fail`.
    """
    parser = training_parser(datasets, networks)
    parser.fail = fail
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(ANSWERED)))
    *_, size = processes()
    try:
        args.milestones = parse_milestones(args.milestones)
    except ValueError as error:
        parser.error(f"argument --milestones: {error}")
    if args.predictions and not args.evaluate:
        parser.error("argument --predictions: it belongs to --evaluate")
    if args.evaluate:
        if size > 1:
            parser.error("argument --evaluate: it takes one process: leave out torchrun")
        refuse_idle(parser, args, "--evaluate, which trains nothing", [key for key in vars(args) if key not in EVALUATING])
        return args
    if args.batch_size % size:
        lower = args.batch_size - args.batch_size % size
        parser.error(f"argument --batch-size: {args.batch_size} cannot be split evenly over {size} processes: use "
                     + (f"{lower} or " if lower else "") + str(lower + size))
    for key in ANSWERED:
        if getattr(args, key) is None and not (key == "num_label" and args.split):
            setattr(args, key, parser.get_default(key))
    row = datasets[args.dataset]
    for applies, choice, keys in (
            (args.no_meta, "--no-meta", ("meta_gradient", "compile", "epsilon", "consistency", "weight", "ramp", "meta_lr")),
            (args.no_meta and not args.mix_up, "--no-meta and no --mix-up", ("include_labeled",)),
            (args.meta_gradient != "jvp", f"--meta-gradient {args.meta_gradient}", ("compile",)),
            (args.meta_gradient == "unrolled", "--meta-gradient unrolled", ("epsilon",)),
            (args.schedule == "cosine", "--schedule cosine", ("milestones", "gamma")),
            (not row.folders, f"--dataset {args.dataset}", ("image_size", "skip_corrupt")),
            (not row.folders or row.flip, f"--dataset {args.dataset}", ("flip",))):
        if applies:
            refuse_idle(parser, args, choice, keys)
    args.image_size = args.image_size or row.image_size
    if row.num_train is not None:
        for flag, count, available in (("--num-val", args.num_val, row.num_train),
                                       ("--num-label", args.num_label, row.num_train - args.num_val)):
            try:
                if count and not (flag == "--num-label" and args.split):
                    check_num_label(count, row.num_classes, available)
            except ValueError as error:
                parser.error(f"argument {flag}: {args.dataset}: {error}")
    return args


def refuse_idle(parser, args, choice, keys):
    """Exits with code 2 if flags among `keys`, which have no effect with a choice, are not at their defaults.

    A default that is spelled out is no contradiction: the official command lines spell out many.
    """
    flags = [f"--{key.replace('_', '-')}" for key in keys if getattr(args, key) not in (None, parser.get_default(key))]
    if flags:
        parser.error(f"argument {', '.join(flags)}: without effect with {choice}: leave {'them' if flags[1:] else 'it'} out")


def cut_short(args):
    """What of the schedule lies beyond the last step of a run, and what that means: one line, or None.  Loads torch."""
    from metasemi import learning_rate, ramp

    steps, ramp_steps = args.total_steps, args.warmup if args.ramp is None else args.ramp
    milestones = args.milestones if args.schedule == "step" else []
    late = [step for step in milestones if step >= steps]
    faults = []
    if args.warmup > steps:             # the rate is highest at the end, or just before it decays
        highest = max(learning_rate(step, args.lr, args.warmup, milestones, args.gamma)
                      for step in (*milestones, steps) if step <= steps)
        faults.append(f"before the end of --warmup {args.warmup}, so the learning rate reaches only {highest:.3g} "
                      f"of {args.lr:g}")
    if ramp_steps > steps and not args.no_meta:
        faults.append(f"before the end of --ramp {ramp_steps}, so the weight of the consistency loss reaches only "
                      f"{ramp(steps, ramp_steps, args.weight):.3g} of {args.weight:g}")
    if late:
        faults.append(f"before --milestones {', '.join(map(str, late))}, so the learning rate does not decay there")
    return f"warning: --total-steps {steps} ends " + "; ".join(faults) if faults else None


def plotting_parser(datasets):
    """The flags of plot_features.py."""
    parser = Parser(
        prog="plot_features.py",
        description="Figure 3 of the paper: the features of one or several trained networks in 2D, one row each; "
                    "or, with --curves, the course of one or several runs.")
    parser.add_argument("--checkpoint-path", nargs="+", type=path, metavar="PATH",
                        help="checkpoints of train_meta.py, one row each")
    parser.add_argument("--row-label", nargs="+", metavar="NAME", help="names of the rows (default: of the run folders)")
    parser.add_argument("--save-path", required=True, type=folder, metavar="DIR",
                        help="folder for the figure and its data")
    parser.add_argument("--dataset", choices=datasets, help="default: that of the checkpoint; another is refused")
    parser.add_argument("--data-path", type=path, metavar="DIR", help="where its files lie (default: as the run had it)")
    parser.add_argument("-a", "--arch", nargs="+", default=[], metavar="NETWORK",
                        help="the networks of the checkpoints; needed for one in a file of your own, FILE:CLASS, which is "
                             "executed")
    parser.add_argument("--index-path", nargs="+", type=path, metavar="PATH",
                        help="label_indices.txt, one per checkpoint; must be the checkpoint's split (default: in its folder)")
    parser.add_argument("--num-point", type=number(int, low=1), metavar="N",
                        help="unlabeled points, and test points, that are drawn (default: 5000, or all if there are fewer)")
    parser.add_argument("--embed-all", action="store_true", help="embed every image and sample for drawing, as the paper did; "
                                                                 "default: sample first")
    parser.add_argument("--method", choices=("tsne", "umap", "pca"), default="tsne", help="embedding (default: %(default)s)")
    parser.add_argument("--backend", choices=("opentsne", "sklearn"), default="opentsne",
                        help="of tsne (default: %(default)s)")
    parser.add_argument("--perplexity", type=number(float, low=1), default=30.0, metavar="X",
                        help="of tsne (default: %(default)s)")
    parser.add_argument("--seed", type=number(int, low=0, high=2 ** 32 - 1), default=1234, metavar="N",
                        help="of the sample and the embedding (default: %(default)s)")
    parser.add_argument("--mark-errors", action="store_true", help="mark the test points that the network misclassifies")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    parser.add_argument("--num-workers", default=4, type=number(int, low=0, high=256), metavar="N",
                        help="processes that decode the images of a folder (default: %(default)s)")
    parser.add_argument("--curves", nargs="+", type=path, metavar="RUN",
                        help="instead of features: test error and loss of these run folders; runs that differ only in their "
                             "seed become one line with a band")
    return parser


def parse_plotting(argv, datasets):
    """Resolved flags of plot_features.py.  Exits with code 2 on a contradiction."""
    parser = plotting_parser(datasets)
    args = parser.parse_args(argv)
    if bool(args.curves) == bool(args.checkpoint_path):
        parser.error("arguments --checkpoint-path and --curves: give one of them")
    rows = len(args.checkpoint_path or ())
    for flag, values in (("--row-label", args.row_label), ("--index-path", args.index_path)):
        if rows and values and len(values) != rows:
            parser.error(f"argument {flag}: {len(values)} values for {rows} checkpoints: give one for each")
    if args.curves:
        refuse_idle(parser, args, "--curves", [key for key in vars(args) if key not in ("curves", "save_path")])
    if args.method != "tsne":
        refuse_idle(parser, args, f"--method {args.method}", ("backend", "perplexity"))
    return args


def check_plotting_files(args):
    """Raises UsageError for a file or folder of the command line that is not there, or a file in the place of a folder."""
    if args.save_path.exists() and not args.save_path.is_dir():
        raise UsageError(f"argument --save-path: {args.save_path} is a file: give a folder")
    for flag, paths in (("--checkpoint-path", args.checkpoint_path), ("--index-path", args.index_path)):
        for path in paths or ():
            if not path.exists():
                raise UsageError(f"argument {flag}: {path} does not exist: give a file that a run has left")
    for path in args.curves or ():
        if not path.is_dir():
            raise UsageError(f"argument --curves: {path} is not a folder: give run folders")


def check_evaluation_files(args):
    """Raises UsageError for a file of --evaluate that is not there, or one of --predictions that cannot be written."""
    if not args.evaluate.exists():
        raise UsageError(f"argument --evaluate: {args.evaluate} does not exist: give a checkpoint or a state dict")
    path = args.predictions
    if path and (path.suffix != ".csv" or path.is_dir()):
        raise UsageError(f"argument --predictions: {path} is not the name of a .csv file")
    if path and not path.parent.is_dir():
        raise UsageError(f"argument --predictions: {path.parent} is not a folder: make it first")


def open_standard_streams():
    """Puts the null device where standard input, output or error was closed: else the next file would take its place.

    What the locale cannot write, such as a name in another alphabet, is escaped on standard output as on standard error.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)                              # takes the lowest free number: this one
            setattr(sys, name, os.fdopen(number, mode, closefd=False, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):             # a pipe that has taken the place of a file
            sys.stdout.reconfigure(errors="backslashreplace")
