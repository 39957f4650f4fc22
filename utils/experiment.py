"""What makes a run that run: one dict name -> text, and one comparison of two of them.

It holds the flags, the sums of the files that they name, the data, the labeled and validation images, and the versions of the
packages.  A resume, the processes of a run, --evaluate, the plot and the report all compare by `differing`.
Nothing here loads torch.
"""
import argparse
import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from datasets import DATASETS, has_unlabeled
from datasets.splits import check_num_label
from models import check_network
from utils import cli
from utils.cli import option
from utils.distributed import processes
from utils.errors import UsageError
from utils.files import ARGS, LAST, holds_run, read_bytes, read_flags, read_split
from utils.flags import (
    COMMAND,
    EVALUATE,
    FROM_CHECKPOINT,
    PER_PROCESS,
    RESUME,
    check_effect,
    command_line,
    declared,
    default,
    parse_given,
    with_role,
)

PACKAGES = ("torch", "torchvision", "numpy", "pillow")


class NamedFiles(NamedTuple):
    """What the files hold that a command line names."""

    labels: list | None                 # images of --split: indices, ascending, or names "class/file"; None without it
    sums: dict                          # "arch", "init" -> SHA-256 of a network's file and of first weights, where there is one


# One dict, one comparison

def facts(flags, sums=(), **more):
    """Returns name -> text, of flags, name -> value, and of more that makes an experiment.

    A flag that is newer than the run has its default.  sums: of `NamedFiles`.  more: such as the data.
    """
    own = {name: flags.get(name, action.default) for name, action in declared().items() if COMMAND not in action.roles}
    return {**{option(name): str(value) for name, value in own.items()},
            **{f"SHA-256 of --{name}": dict(sums).get(name, "none") for name in ("arch", "init")}, **more}


def differing(now, then, ignored=()):
    """Returns the names of what differs between two experiments, of what both hold and is not ignored."""
    return [name for name, text in now.items() if name not in ignored and then.get(name, text) != text]


def options(roles):
    """Returns the spellings of the flags that have one of some roles."""
    return {option(name) for role in roles for name in with_role(role)}


def describe_data(digest, labeled=None, validation=None):
    """Returns what `facts` holds of a run's data: the digest of `data_digest`, and sums of the images with a label."""
    split = {"labeled images": labeled, "validation images": validation}
    return {**digest, **{name: hashlib.sha256(repr(sorted(index)).encode()).hexdigest()
                         for name, index in split.items() if index is not None}}


def versions():
    """Returns the versions of what computes, name -> text."""
    return {package: version(package) for package in PACKAGES}


def plain_flags(args):
    """Returns the flags of a run as plain types, as args.json and a checkpoint keep them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
            if name not in with_role(COMMAND)}


def check_same_flags(args, sums, then, sums_then, step=0):
    """Raises UsageError if a flag, or a file that it names, would make a resumed run another experiment.

    then, sums_then: `plain_flags` and sums of the run.  step: how far it has come; later milestones may move.
    """
    flags, then = ({**flags, "milestones": [m for m in flags.get("milestones", ()) if m < step]}
                   for flags in (plain_flags(args), then))
    ignored = options([RESUME]) - ({"--total-steps"} if args.schedule == "cosine" else set())       # which ends with the run
    before, now = facts(then, sums_then), facts(flags, sums)
    for name in differing(now, before, ignored):
        if name.startswith("SHA-256 of "):
            flag = name.removeprefix("SHA-256 of ")
            raise UsageError(f"argument {flag}: {flags[flag[2:]]} has changed since the run that --resume continues (SHA-256 "
                             f"{before[name]} then, {now[name]} now): restore the file, or give another --save-path without "
                             "--resume")
        remedy = "leave it out" if before[name] in ("None", "False") else f"give {before[name]}"
        raise UsageError(f"argument {name}: {now[name]} now, {before[name]} in the run that --resume continues: {remedy}, "
                         "or give another --save-path without --resume")


def check_same_run(args, files, saved):
    """Raises UsageError if the command line would make of the run of a checkpoint another experiment; files: `NamedFiles`."""
    check_same_flags(args, files.sums, saved["args"], saved["files"], saved["step"])
    if files.labels and not isinstance(files.labels[0], str):
        check_same_list(args, files.labels, saved)


def check_same_list(args, indices, saved):
    """Raises UsageError if the indices of --split, ascending, are not those of a checkpoint."""
    if indices != sorted(saved["labeled"].tolist() + saved["validation"].tolist()):
        raise UsageError(f"argument --split: {args.split} is not the split of the run that --resume continues")


def check_same_processes(world, args, sums, data):
    """Raises UsageError, which names what differs, unless all processes of a world are in one experiment."""
    own = facts(plain_flags(args), sums, **data, **versions())
    everyone = world.all_gather_object(own)
    for rank, other in enumerate(everyone):
        if names := differing(other, everyone[0], options([PER_PROCESS])):
            raise UsageError(f"process {rank} is in another experiment than process 0: "
                             + ", ".join(f"{name} {other[name][:40]}, not {everyone[0][name][:40]}" for name in names)
                             + ": start all with the same flags, data, network and versions")


# The flags of a command, resolved against the run that it continues

def resolve_flags(argv=None, fail=cli.fail):
    """Returns the flags of train_meta.py, and the set of the names of those on the command line.

    With --resume, the others are those of the run that it continues; with --evaluate, None where the checkpoint answers.
    fail: a function as `errors.fail`, which ends the program with code 2 for a contradiction.
    """
    parser, given = parse_given(argv, fail)
    named = {name for name, value in vars(given).items() if value is not None}
    defaults = {name: default(name) for name in declared()}
    if given.predictions and not given.evaluate:
        parser.error("argument --predictions: it belongs to --evaluate")
    try:
        *_, size = processes()
        if given.evaluate:
            if size > 1:
                parser.error("argument --evaluate: it takes one process: leave out torchrun")
            used = with_role(EVALUATE) | with_role(FROM_CHECKPOINT)
            cli.refuse_without_effect(parser, given, "--evaluate, which trains nothing", [n for n in defaults if n not in used])
            return merged(given, defaults | dict.fromkeys(with_role(FROM_CHECKPOINT))), named
        earlier = flags_to_resume(given)
        args = merged(given, defaults | earlier)
        if "num_label" not in named | earlier.keys() and has_unlabeled(args.dataset, args.data_path):
            args.num_label = None       # all of them, once they are counted
        check_effect(parser, given, args)
        check_counts(args, size)
        args.image_size = args.image_size or DATASETS[args.dataset].image_size
        if earlier:
            check_same_flags(args, {}, defaults | earlier, {})
    except (ValueError, OSError) as error:
        fail(parser.prog, error, 2)
    return args, named


def merged(given, otherwise):
    """Returns the flags that were given, and for the others what `otherwise` says."""
    return argparse.Namespace(**otherwise | {name: value for name, value in vars(given).items() if value is not None})


def flags_to_resume(given):
    """Returns the flags in the args.json of the run that --resume continues; {} without one.

    --resume with a run folder stands for --save-path with that folder and --resume.  Raises UsageError for a damaged args.json,
    and for a folder or a network that the command line must name.
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
    folder = given.save_path or default("save_path")
    if given.resume != LAST:
        folder = given.resume.parent
    if not (folder / ARGS).exists():
        return {}
    flags = parse_again(read_flags(folder), folder / ARGS)
    if ":" in (flags.get("arch") or "") and given.arch is None:
        raise unnamed_code(folder, flags["arch"])
    return flags


def parse_again(flags, path):
    """Returns flags that a run has kept, checked as those of a command line; path: of their file, for the message."""
    def fail(prog, message, code):
        raise UsageError(f"{path} is damaged: {message}: restore it, or remove it and give every flag of the run")

    _, parsed = parse_given(command_line(flags), fail)
    return {name: value for name, value in vars(parsed).items() if value is not None and name not in with_role(COMMAND)}


def unnamed_code(path, name):
    """Returns the error of a run or checkpoint whose network is code that the command line does not name."""
    return UsageError(f"argument --arch: {path} was trained with {name}, which is code: it runs only if you say -a {name}")


def check_arch(name, sums, path, arch, sums_given):
    """Raises UsageError unless the command line allows the network of a checkpoint, with its sums, to be built.

    arch, sums_given: the networks that the command line names, and "arch" -> SHA-256 of each, by name.  The network must be one
    of them, its file unchanged; with none named, it may be any but one in a file.
    """
    if ":" in name and not arch:
        raise unnamed_code(path, name)
    if arch and name not in arch:
        raise UsageError(f"argument --arch: {', '.join(arch)}, but {path} was trained with {name}")
    if arch and sums_given[name] != sums.get("arch"):
        raise UsageError(f"argument --arch: {name} has changed since {path} was trained (SHA-256 {sums.get('arch')} "
                         f"then, {sums_given[name]} now): restore the file")


def check_counts(args, size):
    """Raises UsageError or DataError for numbers of images that cannot be divided; size: of processes."""
    if args.batch_size % size:
        lower = args.batch_size - args.batch_size % size
        raise UsageError(f"argument --batch-size: {args.batch_size} cannot be split evenly over {size} processes: use "
                         + (f"{lower} or " if lower else "") + str(lower + size))
    dataset = DATASETS[args.dataset]
    if dataset.num_train is not None:
        if args.num_val:
            check_num_label("--num-val", args.num_val, dataset.num_classes, dataset.num_train, keep=1)
        if args.num_label and not args.split:
            check_num_label("--num-label", args.num_label, dataset.num_classes, dataset.num_train - args.num_val)


# The files that a command line names

def read_named_files(args, named):
    """Reads the files that the command line names, of which no network is executed, and returns NamedFiles.

    Sets args.num_label to what the file of --split says.
    """
    labels = None
    if "split" in named:
        labels = read_labels(args.split, args.num_label if "num_label" in named else None)
        args.num_label = len(labels) - args.num_val
        if isinstance(labels[0], str) and not DATASETS[args.dataset].folders:
            raise UsageError(f"argument --split: {args.split} names files, but {args.dataset} has none: write indices")
    sums = {"arch": check_network(args.arch) if args.arch else None, "init": sum_of_weights(args.init) if args.init else None}
    return NamedFiles(labels, {name: value for name, value in sums.items() if value})


def read_labels(path, num_label=None):
    """Returns the indices of --split, ascending, a list of ints, or the names of files, of str.

    num_label: how many there must be, if not None.
    """
    try:
        indices = sorted(read_split(path, names=True))
    except UsageError as error:
        raise UsageError(f"argument --split: {error}") from None
    if not indices:
        raise UsageError(f"argument --split: {path} names no image: write one a line")
    if num_label not in (None, len(indices)):
        raise UsageError(f"argument --num-label: {num_label}, but --split {path} has {len(indices)} lines: leave the flag out")
    return indices


def sum_of_weights(path):
    """Returns the SHA-256 of the file of --init."""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except UsageError as error:
        raise UsageError(f"argument --init: {error}: give a file of weights") from None
