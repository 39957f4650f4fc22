"""The flags of train_meta.py and plot_features.py.  Each is declared once, with its roles; everything else follows from them.

A flag without a role defines the experiment: it must be the same in all parts of a run and in all its processes.
Nothing here loads torch.
"""
import argparse
import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

from datasets import DATASETS, has_unlabeled
from datasets.splits import check_num_label
from models import NETWORKS, check_network
from utils import cli
from utils.cli import Parser, UsageError, folder, number, option, parse_milestones, path, refuse_idle
from utils.files import ARGS, LAST, holds_run
from utils.records import read_flags, read_given_split

COMMAND = "belongs to one command, not to the run"
RESUME = "may change when a run is resumed"
PER_PROCESS = "may differ between the processes of a run: a machine's own"
EVALUATE = "is used by --evaluate"
FROM_CHECKPOINT = "is used by --evaluate, which takes it from the checkpoint unless it is given"
COUNT, POSITIVE = number(int, low=1), number(float, above=0)


class Milestones(argparse.Action):
    """Takes a list of steps in any of the ways of `cli.parse_milestones`."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            setattr(namespace, self.dest, parse_milestones(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def flag(group, *names, roles=(), **options):
    """Declares one flag in a group of a parser."""
    group.add_argument(*names, **options).roles = roles


def network(text):
    """An argparse type: the name of one of the networks, or FILE:CLASS."""
    file, _, name = text.rpartition(":")
    if text not in NETWORKS and not (file and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is no network: choose from {', '.join(NETWORKS)}, or name a class in "
                                         "a file of your own, path/to/net.py:Net")
    return text


def no_gpu(text):
    """An argparse type of the official flag --gpu, which is not taken."""
    raise argparse.ArgumentTypeError("the GPU is chosen by the environment: CUDA_VISIBLE_DEVICES=0 python3 train_meta.py ...")


def training_parser():
    """The flags of train_meta.py, with a set of `roles` on each action."""
    parser = Parser(
        prog="train_meta.py",
        description="Train MetaSemi, or one of the other rows of the paper's ablation.",
        epilog="rows of the ablation:  MetaSemi: --mix-up   meta only: (neither flag)   mix-up only: --no-meta --mix-up   "
               "supervised: --no-meta")
    add_data_flags(parser.add_argument_group("data"))
    add_method_flags(parser.add_argument_group("method"))
    add_optimization_flags(parser.add_argument_group("optimization"))
    add_bookkeeping_flags(parser.add_argument_group("bookkeeping"))
    return parser


def add_data_flags(data):
    flag(data, "--dataset", roles={FROM_CHECKPOINT}, choices=DATASETS, default="cifar10",
         help="data set (default: %(default)s)")
    flag(data, "--data-path", roles={FROM_CHECKPOINT, RESUME, PER_PROCESS}, default=Path("./data"), type=path, metavar="DIR",
         help="where its files lie or are downloaded to (default: ./data)")
    flag(data, "--num-label", default=4000, type=COUNT, metavar="N",
         help="labeled images, class-balanced; as many as there are training images: all (default: %(default)s; all if there "
              "are images without a class)")
    flag(data, "--split", roles={PER_PROCESS}, type=path, metavar="FILE",
         help="instead of a choice by the seed: the images that have a label, one a line, an index as in label_indices.txt or "
              "class/file under the training folder; no other label is used, not even by --num-val")
    flag(data, "--num-val", default=0, type=number(int, low=0), metavar="N",
         help="training images held out to select model_best.pth; 0: the test set selects (default: 0)")
    flag(data, "--include-labeled", action="store_true", help="put the labeled images in the unlabeled set too")
    flag(data, "--image-size", roles={FROM_CHECKPOINT}, type=number(int, low=16, high=1024), metavar="PIXELS",
         help="--dataset folder, imagenet and stl10: images become squares of this size (default: 32; imagenet: 224; "
              "stl10: 96)")
    flag(data, "--flip", action="store_true", help="--dataset folder: random horizontal flips in training")
    flag(data, "--num-workers", roles={EVALUATE, RESUME, PER_PROCESS}, default=4, type=number(int, low=0, high=256),
         metavar="N", help="--dataset folder and imagenet: processes that decode images (default: %(default)s)")
    flag(data, "--skip-corrupt", roles={EVALUATE, RESUME}, action="store_true",
         help="--dataset folder and imagenet: put the next readable image in the place of one that cannot be read")


def add_method_flags(method):
    flag(method, "-a", "--architecture", "--arch", dest="arch", roles={FROM_CHECKPOINT}, type=network, default="convlarge",
         metavar="NETWORK",
         help=f"{', '.join(NETWORKS)}, or FILE:CLASS in a file of your own, which is executed, and never "
              "because a checkpoint names it (default: %(default)s)")
    flag(method, "--init", roles={PER_PROCESS}, type=path, metavar="FILE",
         help="start from the weights in this state dict, or checkpoint; those of torchvision fit resnet18 and resnet50, whose "
              "last layer starts at random for another number of classes (default: random weights)")
    flag(method, "--mix-up", action="store_true", help="mix labeled and unlabeled images (lines 9-12 of Algorithm 2)")
    flag(method, "--alpha", default=1.0, type=POSITIVE, metavar="GAMMA",
         help="the paper's gamma: mix-up weights ~ Beta(gamma, gamma) (default: %(default)s)")
    flag(method, "--no-meta", action="store_true", help="no meta-gradient and no consistency loss")
    flag(method, "--meta-gradient", choices=("jvp", "finite-difference", "unrolled"), default="jvp",
         help="exact and fast, the paper's approximation, or double backward (default: %(default)s)")
    flag(method, "--epsilon", default=1e-2, type=POSITIVE, metavar="X",
         help="length of the half-step of finite-difference (default: %(default)s)")
    flag(method, "--consistency", choices=("mse", "kl"), default="mse", help="consistency loss (default: %(default)s)")
    flag(method, "--weight", default=1.0, type=number(float, low=0), metavar="W",
         help="weight of the consistency loss after its ramp (default: %(default)s)")
    flag(method, "--ramp", type=number(int, low=0), metavar="N",
         help="steps of linear ramp of that weight; 0: none (default: as --warmup)")


def add_optimization_flags(optimization):
    flag(optimization, "--total-steps", roles={RESUME}, default=400_000, type=COUNT, metavar="N",
         help="updates (default: %(default)s)")
    flag(optimization, "--batch-size", default=128, type=number(int, low=1, high=1_000_000), metavar="B",
         help="labeled images a step, and as many unlabeled ones, in all processes together "
              "(default: %(default)s)")
    flag(optimization, "--sync-bn", action="store_true",
         help="under torchrun: batch normalization over the batches of all processes (default: each its "
              "own)")
    flag(optimization, "--lr", default=0.1, type=POSITIVE, metavar="X",
         help="learning rate alpha_t (default: %(default)s)")
    flag(optimization, "--meta-lr", default=None, type=number(float, low=0), metavar="X",
         help="fixed meta learning rate beta (default: beta_t is the current learning rate)")
    flag(optimization, "--warmup", default=4000, type=number(int, low=0), metavar="N",
         help="steps of linear warm-up of the learning rate (default: %(default)s)")
    flag(optimization, "--schedule", choices=("step", "cosine"), default="step",
         help="after the warm-up: decay at --milestones, or a cosine to 0 at the last step "
              "(default: %(default)s)")
    flag(optimization, "--milestones", action=Milestones, default=[300_000, 350_000], nargs="+", metavar="STEP",
         help='the learning rate decays after these steps (default: "[300000, 350000]"; "[]": never)')
    flag(optimization, "--gamma", default=0.1, type=number(float, above=0, high=1), metavar="X",
         help="learning-rate decay factor; not the paper's gamma (default: %(default)s)")
    flag(optimization, "--momentum", default=0.9, type=number(float, low=0, below=1), metavar="X",
         help="momentum of SGD (default: %(default)s)")
    flag(optimization, "--weight-decay", default=1e-4, type=number(float, low=0), metavar="X",
         help="weight decay, on every parameter (default: %(default)s)")
    flag(optimization, "--seed", default=1234, type=number(int, low=0, high=2 ** 63 - 1), metavar="N",
         help="of the split, the order, the augmentation and the weights (default: %(default)s)")
    flag(optimization, "--device", roles={EVALUATE, RESUME}, choices=("auto", "cpu", "cuda"), default="auto",
         help="auto: CUDA if there is one")
    flag(optimization, "--precision", roles={FROM_CHECKPOINT, RESUME}, choices=("float32", "tf32", "bfloat16"),
         default="float32",
         help="of the network's arithmetic; weights, losses and batch statistics stay float32 "
              "(default: %(default)s)")
    flag(optimization, "--gpu", roles={COMMAND}, type=no_gpu, help=argparse.SUPPRESS)
    flag(optimization, "--compile", roles={RESUME}, action="store_true",
         help="compile the meta-gradient jvp, equal up to rounding: pays a little for small networks on the CPU "
              "(convsmall: 1.04 times the steps a second; convlarge: none more); unmeasured on CUDA")


def add_bookkeeping_flags(run):
    flag(run, "--save-path", roles={COMMAND}, default=Path("./results/tmp"), type=folder, metavar="DIR",
         help="run folder (default: ./results/tmp)")
    flag(run, "--resume", roles={COMMAND}, nargs="?", const=LAST, type=folder, metavar="PATH",
         help="continue from this checkpoint, or the run in this folder; without PATH the run in --save-path, if there is one; "
              "flags that are not given are those of the run")
    flag(run, "--overwrite", roles={COMMAND}, action="store_true", help="start afresh in a folder that holds a run")
    flag(run, "--print-freq", roles={RESUME}, default=100, type=COUNT, metavar="N",
         help="steps between log lines (default: %(default)s)")
    flag(run, "--test-freq", roles={RESUME}, default=400, type=COUNT, metavar="N",
         help="steps between evaluations, each followed by a checkpoint (default: %(default)s)")
    flag(run, "--evaluate", roles={COMMAND, EVALUATE}, type=path, metavar="PATH",
         help="train nothing: measure this checkpoint, or state dict, on the test set; a checkpoint knows its "
              "network and data, a state dict, also one under that key in a checkpoint of another program, takes --dataset and "
              "--arch from the command line")
    flag(run, "--predictions", roles={COMMAND, EVALUATE}, type=path, metavar="FILE.csv",
         help="--evaluate: write the prediction for each image; those in a --data-path without classes are predicted, too")


@cache
def declared():
    """name -> argparse action, of the flags of train_meta.py."""
    return {action.dest: action for action in training_parser()._actions if action.dest != "help"}


@cache
def with_role(role):
    """The names of the flags of train_meta.py that have a role."""
    return {name for name, action in declared().items() if role in action.roles}


def parse_training(argv, fail=cli.fail):
    """Resolved flags of train_meta.py; `given` is the set of those on the command line.

    With --resume, the others are those of the run that it continues; with --evaluate, None where the checkpoint answers.
    fail: a function as `cli.fail`, which ends the program with code 2 for a contradiction.
    """
    parser, given = parse_given(argv, fail)
    defaults = {name: action.default for name, action in declared().items()}
    if given.predictions and not given.evaluate:
        parser.error("argument --predictions: it belongs to --evaluate")
    *_, size = cli.processes()
    try:
        if given.evaluate:
            if size > 1:
                parser.error("argument --evaluate: it takes one process: leave out torchrun")
            used = with_role(EVALUATE) | with_role(FROM_CHECKPOINT)
            refuse_idle(parser, given, "--evaluate, which trains nothing", [name for name in defaults if name not in used])
            return resolved(given, defaults | dict.fromkeys(with_role(FROM_CHECKPOINT)))
        earlier = flags_to_resume(given)
        args = resolved(given, defaults | earlier)
        if "num_label" not in args.given | earlier.keys() and has_unlabeled(args.dataset, args.data_path):
            args.num_label = None       # all of them, once they are counted
        check_effect(parser, given, args)
        check_counts(args, size)
        args.image_size = args.image_size or DATASETS[args.dataset].image_size
        if earlier:
            check_same_experiment(args, experiment(argparse.Namespace(**defaults | earlier)))
    except (ValueError, OSError) as error:
        fail(parser.prog, error, 2)
    return args


def parse_given(words, fail):
    """The parser of train_meta.py, and the flags that a command line gives; the others are None."""
    parser = training_parser()
    parser.fail = fail
    return parser, parser.parse_args(words, argparse.Namespace(**dict.fromkeys(declared())))


def resolved(given, otherwise):
    """The flags that were given, and for the others what `otherwise` says."""
    values = {name: value for name, value in vars(given).items() if value is not None}
    return argparse.Namespace(**otherwise | values, given=set(values))


def read_given_files(args):
    """Reads what the command line names: `args.labeled` becomes the images of --split, as `read_given_split` returns them, or
    None, `args.arch_sha256` the sum of a custom network, which is not executed, and `args.init_sha256` that of --init."""
    args.labeled = None
    if "split" in args.given:
        args.labeled = read_given_split(args.split, args.num_label if "num_label" in args.given else None)
        args.num_label = len(args.labeled) - args.num_val
        if isinstance(args.labeled[0], str) and not DATASETS[args.dataset].folders:
            raise UsageError(f"argument --split: {args.split} names files, but {args.dataset} has none: write indices")
    if args.arch and (sha256 := check_network(args.arch)):
        args.arch_sha256 = sha256
    if args.init:
        args.init_sha256 = hash_file(args.init)


def hash_file(path):
    """SHA-256 of the file of --init.  Raises UsageError."""
    if path.exists() and not path.is_file():
        raise UsageError(f"argument --init: {path} is not a regular file: give a file of weights")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"argument --init: {path} cannot be read ({error.strerror}): give a file of weights") from None


def flags_to_resume(given):
    """The flags in the args.json of the run that --resume continues; {} without one.

    --resume with a run folder stands for --save-path with that folder and --resume.  A flag that is newer than the run
    has its default.  Raises UsageError for a damaged args.json, and for a folder or a network that the command line must name.
    """
    if given.resume is None:
        return {}
    if given.resume != LAST and given.resume.is_dir():
        if given.save_path not in (None, given.resume):
            raise UsageError(f"argument --resume: {given.resume} is a folder: give a checkpoint in it, or leave --save-path "
                             "out")
        if not holds_run(given.resume):
            raise UsageError(f"argument --resume: {given.resume} holds no run: give the folder of one, or --save-path for a "
                             "new run")
        given.save_path, given.resume = given.resume, LAST
    folder = given.save_path or declared()["save_path"].default
    if given.resume != LAST:
        folder = given.resume.parent
    if not (folder / ARGS).exists():
        return {}

    def fail(prog, message, code):
        raise UsageError(f"{folder / ARGS} is damaged: {message}: restore it, or remove it and give every flag of the run")

    words = [option(name) if value is True else f"{option(name)}={value}" for name, value in read_flags(folder).items()
             if name in declared() and value is not None and value is not False]
    _, flags = parse_given(words, fail)
    if ":" in (flags.arch or "") and given.arch is None:
        raise unnamed_code(folder, flags.arch)
    return {name: value for name, value in vars(flags).items() if value is not None and name not in with_role(COMMAND)}


def unnamed_code(path, name):
    """The error of a run or checkpoint whose network is code that the command line does not name."""
    return UsageError(f"argument --arch: {path} was trained with {name}, which is code: it runs only if you say -a {name}")


def check_effect(parser, given, args):
    """Refuses flags that were given and have no effect together with the others."""
    dataset = DATASETS[args.dataset]
    for applies, choice, names in (
            (args.no_meta, "--no-meta", ("meta_gradient", "compile", "epsilon", "consistency", "weight", "ramp", "meta_lr")),
            (args.no_meta and not args.mix_up, "--no-meta and no --mix-up", ("include_labeled",)),
            (args.meta_gradient != "jvp", f"--meta-gradient {args.meta_gradient}", ("compile",)),
            (args.meta_gradient == "unrolled", "--meta-gradient unrolled", ("epsilon",)),
            (args.schedule == "cosine", "--schedule cosine", ("milestones", "gamma")),
            (not dataset.folders, f"--dataset {args.dataset}", (*["image_size"] * (not dataset.resized), "skip_corrupt")),
            (not dataset.folders or dataset.flip, f"--dataset {args.dataset}", ("flip",))):
        if applies:
            refuse_idle(parser, given, choice, names)


def check_counts(args, size):
    """Raises UsageError for numbers of images that cannot be divided; size: of processes."""
    if args.batch_size % size:
        lower = args.batch_size - args.batch_size % size
        raise UsageError(f"argument --batch-size: {args.batch_size} cannot be split evenly over {size} processes: use "
                         + (f"{lower} or " if lower else "") + str(lower + size))
    dataset = DATASETS[args.dataset]
    if dataset.num_train is not None:
        for name, count, available in (
                ("--num-val", args.num_val, dataset.num_train),
                ("--num-label", None if args.split else args.num_label, dataset.num_train - args.num_val)):
            try:
                if count:
                    check_num_label(count, dataset.num_classes, available)
            except ValueError as error:
                raise UsageError(f"argument {name}: {args.dataset}: {error}") from None


# What follows from the flags of a run

def experiment(args):
    """The flags of a run as plain types, without those that belong to one command; what args.json and a checkpoint keep."""
    names = declared().keys() - with_role(COMMAND) | {"arch_sha256", "init_sha256"}
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name in names}


def common_facts(args):
    """What the processes of a run must have in common before any data are loaded: its flags and versions."""
    return {**{name: value for name, value in experiment(args).items() if name not in with_role(PER_PROCESS)},
            **{package: version(package) for package in ("torch", "torchvision", "numpy", "pillow")}}


def difference(now, then, free):
    """The first flag in which two runs are different experiments, or None; both as `experiment` returns them.

    free: names of flags that do not count.  A flag that is newer than one of the runs has its default there.
    """
    defaults = {name: action.default for name, action in declared().items()}
    return next((name for name, value in now.items() if name not in free and value != then.get(name, defaults.get(name))), None)


def check_same_experiment(args, then, step=0):
    """Raises UsageError if a flag would make a resumed run another experiment.

    then: `experiment` of the run.  step: how far it has come; later milestones may move.
    """
    now, then = ({**flags, "milestones": [m for m in flags["milestones"] if m < step]} for flags in (experiment(args), then))
    free = with_role(RESUME)
    if args.schedule == "cosine":       # it ends with the run
        free = free - {"total_steps"}
    name = difference(now, then, free)
    if name in ("arch_sha256", "init_sha256"):
        flag_name = name.removesuffix("_sha256")
        raise UsageError(f"argument --{flag_name}: {now[flag_name]} has changed since the run that --resume continues (SHA-256 "
                         f"{then.get(name)} then, {now[name]} now): restore the file, or give another --save-path without "
                         "--resume")
    if name:
        value = then.get(name, declared()[name].default)
        remedy = "leave it out" if value is None or value is False else f"give {value}"
        raise UsageError(f"argument {option(name)}: {now[name]} now, {value} in the run that --resume continues: {remedy}, "
                         "or give another --save-path without --resume")


def plotting_parser():
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
    parser.add_argument("--dataset", choices=DATASETS, help="default: that of the checkpoint; another is refused")
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


def parse_plotting(argv):
    """Resolved flags of plot_features.py.  Exits with code 2 on a contradiction."""
    parser = plotting_parser()
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
    for name, paths in (("--checkpoint-path", args.checkpoint_path), ("--index-path", args.index_path)):
        for file in paths or ():
            if not file.exists():
                raise UsageError(f"argument {name}: {file} does not exist: give a file that a run has left")
    for run in args.curves or ():
        if not run.is_dir():
            raise UsageError(f"argument --curves: {run} is not a folder: give run folders")


def check_evaluation_files(args):
    """Raises UsageError for a file of --evaluate that is not there, or one of --predictions that cannot be written."""
    if not args.evaluate.exists():
        raise UsageError(f"argument --evaluate: {args.evaluate} does not exist: give a checkpoint or a state dict")
    path = args.predictions
    if path and (path.suffix != ".csv" or path.is_dir()):
        raise UsageError(f"argument --predictions: {path} is not the name of a .csv file")
    if path and not path.parent.is_dir():
        raise UsageError(f"argument --predictions: {path.parent} is not a folder: make it first")
