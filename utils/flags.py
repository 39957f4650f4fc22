"""The flags of train_meta.py.  Each is declared once, with its roles; everything else follows from them.

A flag without a role defines the experiment: it must be the same in all parts of a run and in all its processes.
Nothing here loads torch.
"""
import argparse
from functools import cache
from pathlib import Path

from datasets import DATASETS
from models import NETWORKS
from utils.cli import Parser, number, option, parse_milestones, path, refuse_without_effect
from utils.errors import UsageError
from utils.files import LAST

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")

COMMAND = "belongs to one command, not to the run"
RESUME = "may change when a run is resumed"
PER_PROCESS = "may differ between the processes of a run: a machine's own"
EVALUATE = "is used by --evaluate"
FROM_CHECKPOINT = "is used by --evaluate, and is that of the checkpoint unless it is given"
OF_META_STEP = ("meta_gradient", "epsilon", "consistency", "weight", "ramp", "meta_lr")        # without effect with --no-meta
COUNT, POSITIVE = number(int, low=1), number(float, above=0)


class Milestones(argparse.Action):
    """Stores a list of steps that was given in any of the ways of `cli.parse_milestones`."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            setattr(namespace, self.dest, parse_milestones(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def flag(group, *names, roles=(), **options):
    """Declares one flag in a group of a parser; its help ends with its default, unless it says that itself."""
    action = group.add_argument(*names, **options)
    action.roles = roles
    if "default" in options and "(default: " not in action.help:
        action.help += " (default: %(default)s)"


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
    """Returns the parser of train_meta.py, with a set of `roles` on each action."""
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
    flag(data, "--dataset", roles={FROM_CHECKPOINT}, choices=DATASETS, default="cifar10", help="data set")
    flag(data, "--data-path", roles={FROM_CHECKPOINT, RESUME, PER_PROCESS}, default=Path("./data"), type=path, metavar="DIR",
         help="where its files lie or are downloaded to (default: ./data)")
    flag(data, "--num-label", default=4000, type=COUNT, metavar="N",
         help="labeled images, the same number of each class, or all training images (default: %(default)s; all if there "
              "are images without a class)")
    flag(data, "--split", roles={PER_PROCESS}, type=path, metavar="FILE",
         help="instead of a choice by the seed: the images that have a label, one a line, an index as in label_indices.txt or "
              "class/file under the training folder; no other label is used, not even by --num-val")
    flag(data, "--num-val", default=0, type=number(int, low=0), metavar="N",
         help="training images held out to select model_best.pth; 0: the test set selects")
    flag(data, "--num-test", roles={FROM_CHECKPOINT}, default=0, type=number(int, low=0), metavar="N",
         help="--dataset folder without a test folder: training images held out for the test, the same for every seed")
    flag(data, "--include-labeled", action="store_true", help="put the labeled images in the unlabeled set too")
    flag(data, "--image-size", roles={FROM_CHECKPOINT}, type=number(int, low=16, high=1024), metavar="PIXELS",
         help="--dataset folder, imagenet and stl10: images become squares of this size (default: 32; imagenet: 224; "
              "stl10: 96)")
    flag(data, "--flip", action="store_true", help="--dataset folder: random horizontal flips in training")
    flag(data, "--num-workers", roles={EVALUATE, RESUME, PER_PROCESS}, default=4, type=number(int, low=0, high=256),
         metavar="N", help="--dataset folder and imagenet: processes that decode images")
    flag(data, "--skip-corrupt", roles={EVALUATE, FROM_CHECKPOINT}, action="store_true",
         help="--dataset folder and imagenet: decode every image before the first step and leave out those that cannot be read")


def add_method_flags(method):
    flag(method, "-a", "--architecture", "--arch", dest="arch", roles={FROM_CHECKPOINT}, type=network, default="convlarge",
         metavar="NETWORK", help=f"{', '.join(NETWORKS)}, or FILE:CLASS in a file of your own, which is executed, and never "
                                 "because a checkpoint names it")
    flag(method, "--init", roles={PER_PROCESS}, type=path, metavar="FILE",
         help="start from the weights in this state dict, or checkpoint; those of torchvision fit resnet18 and resnet50, whose "
              "last layer starts at random for another number of classes (default: random weights)")
    flag(method, "--mix-up", action="store_true", help="mix labeled and unlabeled images (lines 9-12 of Algorithm 2)")
    flag(method, "--alpha", default=1.0, type=POSITIVE, metavar="GAMMA",
         help="the paper's gamma: mix-up weights ~ Beta(gamma, gamma)")
    flag(method, "--no-meta", action="store_true", help="no meta-gradient and no consistency loss")
    flag(method, "--meta-gradient", choices=("jvp", "finite-difference", "unrolled"), default="jvp",
         help="exact and fast, the paper's approximation, or double backward")
    flag(method, "--epsilon", default=1e-2, type=number(float, low=1.2e-7, high=8_000_000), metavar="X",
         help="length of the half-step of finite-difference")
    flag(method, "--consistency", choices=("mse", "kl"), default="mse", help="consistency loss")
    flag(method, "--weight", default=1.0, type=number(float, low=0), metavar="W",
         help="weight of the consistency loss after its ramp")
    flag(method, "--ramp", type=number(int, low=0), metavar="N",
         help="steps of linear ramp of that weight; 0: none (default: as --warmup)")


def add_optimization_flags(optimization):
    flag(optimization, "--total-steps", roles={RESUME}, default=400_000, type=COUNT, metavar="N", help="updates")
    flag(optimization, "--batch-size", default=128, type=number(int, low=1, high=1_000_000), metavar="B",
         help="labeled images a step, and as many unlabeled ones, in all processes together")
    flag(optimization, "--sync-bn", action="store_true",
         help="under torchrun: batch normalization over the batches of all processes (default: each its own)")
    flag(optimization, "--lr", default=0.1, type=POSITIVE, metavar="X", help="learning rate alpha_t")
    flag(optimization, "--meta-lr", default=None, type=number(float, low=0), metavar="X",
         help="fixed meta learning rate beta (default: beta_t is the current learning rate)")
    flag(optimization, "--warmup", default=4000, type=number(int, low=0), metavar="N",
         help="steps of linear warm-up of the learning rate")
    flag(optimization, "--schedule", choices=("step", "cosine"), default="step",
         help="after the warm-up: decay at --milestones, or a cosine to 0 at the last step")
    flag(optimization, "--milestones", action=Milestones, default=[300_000, 350_000], nargs="+", metavar="STEP",
         help='the learning rate decays after these steps (default: "[300000, 350000]"; "[]": never)')
    flag(optimization, "--gamma", default=0.1, type=number(float, above=0, high=1), metavar="X",
         help="learning-rate decay factor; not the paper's gamma")
    flag(optimization, "--momentum", default=0.9, type=number(float, low=0, below=1), metavar="X", help="momentum of SGD")
    flag(optimization, "--weight-decay", default=1e-4, type=number(float, low=0), metavar="X",
         help="weight decay, on every parameter")
    flag(optimization, "--seed", default=1234, type=number(int, low=0, high=2 ** 63 - 1), metavar="N",
         help="of the split, the order, the augmentation and the weights")
    flag(optimization, "--device", roles={EVALUATE, RESUME}, choices=DEVICES, default="auto",
         help="auto: the accelerator that torch finds, else the CPU")
    flag(optimization, "--precision", roles={FROM_CHECKPOINT, RESUME}, choices=("float32", "tf32", "bfloat16"),
         default="float32", help="of the network's arithmetic; weights, losses and batch statistics stay float32")
    flag(optimization, "--gpu", roles={COMMAND}, type=no_gpu, help=argparse.SUPPRESS)


def add_bookkeeping_flags(run):
    flag(run, "--save-path", roles={COMMAND}, default=Path("./results/tmp"), type=path, metavar="DIR",
         help="run folder (default: ./results/tmp)")
    flag(run, "--resume", roles={COMMAND}, nargs="?", const=LAST, type=path, metavar="PATH",
         help="continue from this checkpoint, or the run in this folder; without PATH the run in --save-path, if there is one; "
              "flags that are not given are those of the run")
    flag(run, "--overwrite", roles={COMMAND}, action="store_true", help="start afresh in a folder that holds a run")
    flag(run, "--print-freq", roles={RESUME}, default=100, type=COUNT, metavar="N", help="steps between log lines")
    flag(run, "--test-freq", roles={RESUME}, default=400, type=COUNT, metavar="N",
         help="steps between evaluations, each followed by a checkpoint")
    flag(run, "--evaluate", roles={COMMAND, EVALUATE}, type=path, metavar="PATH",
         help="train nothing: measure this checkpoint, or state dict, on the test set; a checkpoint knows its "
              "network and data, a state dict, also one under that key in a checkpoint of another program, takes --dataset and "
              "--arch from the command line")
    flag(run, "--predictions", roles={COMMAND, EVALUATE}, type=path, metavar="FILE.csv",
         help="--evaluate: write the prediction for each image; those in a --data-path without classes are predicted, too")


@cache
def declared():
    """Returns name -> argparse action, of the flags of train_meta.py."""
    return {action.dest: action for action in training_parser()._actions if action.dest != "help"}


@cache
def with_role(role):
    """Returns the names of the flags of train_meta.py that have a role."""
    return {name for name, action in declared().items() if role in action.roles}


def defaults():
    """Returns name -> default, of the flags of train_meta.py."""
    return {name: action.default for name, action in declared().items()}


def kept():
    """Returns name -> default, of the flags that a run keeps: all that do not belong to one command."""
    return {name: value for name, value in defaults().items() if name not in with_role(COMMAND)}


def parse_given(words, fail):
    """Returns the parser of train_meta.py, and a namespace of the flags that a command line gives."""
    parser = training_parser()
    parser.fail = fail
    parsed = vars(parser.parse_args(words, argparse.Namespace(**dict.fromkeys(declared()))))
    return parser, argparse.Namespace(**{name: value for name, value in parsed.items() if value is not None})


def command_line(flags):
    """Returns words that give these flags, name -> value; what is no flag is left out."""
    return [option(name) if value is True else f"{option(name)}={value}" for name, value in flags.items()
            if name in declared() and value is not None and value is not False]


def parse_again(flags, path):
    """Returns flags that a run has kept, checked as those of a command line; path: of their file, for the message."""
    def fail(prog, message, code):
        raise UsageError(f"{path} is damaged: {message}: restore it, or remove it and give every flag of the run, "
                         "--resume with its checkpoint, and a new --save-path")

    _, parsed = parse_given(command_line(flags), fail)
    return {name: value for name, value in vars(parsed).items() if name in kept()}


def check_effect(parser, given, args):
    """Refuses flags that were given and have no effect together with the others."""
    if args.evaluate:
        unused = [name for name in vars(given) if name not in with_role(EVALUATE) | with_role(FROM_CHECKPOINT)]
        return refuse_without_effect(parser, given, "--evaluate, which trains nothing", unused)
    dataset = DATASETS[args.dataset]
    for applies, choice, names in (
            (True, "no --evaluate", ("predictions",)),
            (args.no_meta, "--no-meta", OF_META_STEP),
            (args.no_meta and not args.mix_up, "--no-meta and no --mix-up", ("include_labeled",)),
            (args.meta_gradient == "unrolled", "--meta-gradient unrolled", ("epsilon",)),
            (args.schedule == "cosine", "--schedule cosine", ("milestones", "gamma")),
            (not dataset.folders, f"--dataset {args.dataset}", (*["image_size"] * (not dataset.resized), "skip_corrupt")),
            (not dataset.folders or dataset.flip, f"--dataset {args.dataset}", ("flip", "num_test"))):
        if applies:
            refuse_without_effect(parser, given, choice, names)
