"""What makes a run that run: one dict name -> text, and one comparison of two of them.

It holds the flags, the sums of the files that they name, the data, the labeled and validation images, and the versions of the
packages.  A resume, the processes of a run, --evaluate, the plot and the report all compare by `differing`.
Nothing here loads torch.
"""
import argparse
import hashlib
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from datasets import DATASETS, has_unlabeled
from datasets.splits import check_num_label
from models import check_network, is_custom
from utils.cli import option
from utils.distributed import processes
from utils.errors import UsageError, fail
from utils.files import ARGS, CHECKPOINT, LAST, PREVIOUS, holds_run, read_bytes, read_flags, read_split
from utils.flags import FROM_CHECKPOINT, PER_PROCESS, RESUME, check_effect, defaults, kept, parse_again, parse_given, with_role


class NamedFiles(NamedTuple):
    """What the files hold that a command line names."""

    labels: list | None                 # images of --split: indices, ascending, or names "class/file"; None without it
    sums: dict                          # "arch", "init" -> SHA-256 of a network's file and of first weights, where there is one


def facts(flags, sums=(), **more):
    """Returns name -> text, of flags, name -> value, and of more that makes an experiment.

    A flag that is newer than the run has its default.  sums: of `NamedFiles`.  more: such as the data.
    """
    return {**{option(name): str(flags.get(name, value)) for name, value in kept().items()},
            **{f"SHA-256 of --{name}": dict(sums).get(name, "none") for name in ("arch", "init")}, **more}


def differing(now, then, ignored=()):
    """Returns the names of what differs between two experiments, of what both hold and is not ignored."""
    return [name for name, text in now.items() if name not in ignored and then.get(name, text) != text]


def options(role):
    """Returns the spellings of the flags that have a role."""
    return set(map(option, with_role(role)))


def versions():
    """Returns the versions of what computes, name -> text."""
    return {package: version(package) for package in ("torch", "torchvision", "numpy", "pillow")}


def plain_flags(args):
    """Returns the flags of a run as plain types, as args.json and a checkpoint keep them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name in kept()}


def check_same_flags(args, sums, then, sums_then, step=0):
    """Raises UsageError if a flag, or a file that it names, would make a resumed run another experiment.

    then, sums_then: `plain_flags` and sums of the run.  step: how far it has come; later milestones may move.
    """
    flags, then = ({**flags, "milestones": [m for m in flags.get("milestones", ()) if m < step]}
                   for flags in (plain_flags(args), then))
    ignored = options(RESUME) - ({"--total-steps"} if args.schedule == "cosine" else set())       # which ends with the run
    before, now = facts(then, sums_then), facts(flags, sums)
    for name in differing(now, before, ignored):
        flag = name.removeprefix("SHA-256 of ")
        remedy = ("restore its file, which has changed since (SHA-256)" if flag != name else
                  "leave it out" if before[name] in ("None", "False") else f"give {before[name]}")
        raise UsageError(f"argument {flag}: {now[name]} now, {before[name]} in the run that --resume continues: {remedy}, or "
                         "give another --save-path without --resume")


def check_same_processes(world, args, sums, data, **split):
    """Raises UsageError, which names what differs, unless all processes of a world are in one experiment.

    sums: of `NamedFiles`.  data: the digest of `data_digest`.  split: name -> indices of the images with a label, a list.
    """
    hashes = {f"{name} images": hashlib.sha256(repr(sorted(indices)).encode()).hexdigest() for name, indices in split.items()}
    everyone = world.all_gather_object(facts(plain_flags(args), sums, **data, **hashes, **versions()))
    for rank, other in enumerate(everyone):
        if names := differing(other, everyone[0], options(PER_PROCESS)):
            raise UsageError(f"process {rank} is in another experiment than process 0: "
                             + ", ".join(f"{name} {other[name][:40]}, not {everyone[0][name][:40]}" for name in names)
                             + ": start all with the same flags, data, network and versions")


def resolve_flags(argv=None):
    """Returns the flags of train_meta.py, and the set of the names of those on the command line.

    With --resume, the others are those of the run that it continues; with --evaluate, None where the checkpoint answers.
    A contradiction ends the program with code 2.
    """
    parser, given = parse_given(argv, fail)
    named = vars(given)
    try:
        *_, size = processes()
        earlier = dict.fromkeys(with_role(FROM_CHECKPOINT)) if "evaluate" in named else flags_to_resume(named)
        args = argparse.Namespace(**defaults() | earlier | named)
        if args.evaluate and size > 1:
            raise UsageError("argument --evaluate: it takes one process: leave out torchrun")
        check_effect(parser, given, args)
        if args.evaluate:
            return args, set(named)
        if "num_label" not in earlier | named and has_unlabeled(args.dataset, args.data_path):
            args.num_label = None       # all of them, once they are counted
        check_counts(args, size)
        args.image_size = args.image_size or DATASETS[args.dataset].image_size
        if earlier:
            check_same_flags(args, {}, earlier, {})
    except (ValueError, OSError) as error:
        fail(parser.prog, error, 2)
    return args, set(named)


def flags_to_resume(named):
    """Returns the flags in the args.json of the run that --resume continues; {} without one.

    named: name -> value, of the flags on the command line; a run folder of --resume moves to --save-path in it.  Raises
    UsageError for a damaged args.json, and for a folder or a network that the command line must name.
    """
    resume = named.get("resume")
    if resume is None:
        return {}
    if resume != LAST and resume.is_dir():
        if named.get("save_path", resume) != resume:
            raise UsageError(f"argument --resume: {resume} is a folder: give a checkpoint in it, or leave --save-path out")
        if not holds_run(resume):
            raise UsageError(f"argument --resume: {resume} holds no run: give the folder of one, or --save-path for a new run")
        named |= {"save_path": resume, "resume": LAST}
    path = (resume.parent if named["resume"] != LAST else named.get("save_path", defaults()["save_path"])) / ARGS
    if not path.exists():
        return {}
    flags = parse_again(read_flags(path.parent), path)
    if flags.get("split") and not any((path.parent / name).exists() for name in (CHECKPOINT, PREVIOUS)):
        named.setdefault("split", flags["split"])       # a run that has saved nothing begins again, with its list
    if "arch" not in named:
        check_arch(flags["arch"], {}, path.parent, {})
    return flags


def check_arch(name, sums, path, given):
    """Raises UsageError unless the command line allows the network of a checkpoint, with its sums, to be built.

    given: the networks that the command line names -> SHA-256 of their files, or None.  The network must be one of them, its
    file unchanged; with none named, it may be any but one in a file.
    """
    if is_custom(name) and not given:
        raise UsageError(f"argument --arch: {path} was trained with {name}, which is code: it runs only if you say -a {name}")
    if given and name not in given:
        raise UsageError(f"argument --arch: {', '.join(given)}, but {path} was trained with {name}")
    if given and given[name] != sums.get("arch"):
        raise UsageError(f"argument --arch: {name} has changed since {path} was trained (SHA-256 {sums.get('arch')} "
                         f"then, {given[name]} now): restore the file")


def check_counts(args, size):
    """Raises UsageError or DataError for numbers of images that cannot be divided; size: of processes."""
    if args.batch_size % size:
        raise UsageError(f"argument --batch-size: {args.batch_size} for {size} processes: use a multiple of {size}")
    dataset = DATASETS[args.dataset]
    if dataset.num_train is not None:
        if args.num_val:
            check_num_label("--num-val", args.num_val, dataset.num_classes, dataset.num_train, keep=1)
        if args.num_label and not args.split:
            check_num_label("--num-label", args.num_label, dataset.num_classes, dataset.num_train - args.num_val)


def read_named_files(args, named):
    """Reads the files that the command line names, of which no network is executed, and returns NamedFiles.

    Sets args.num_label to what the file of --split says.
    """
    labels, sums = None, {}
    if "split" in named:
        with about("argument --split"):
            labels = sorted(read_split(args.split))
            if not labels:
                raise UsageError(f"{args.split} names no image: write one a line")
            if isinstance(labels[0], str) and not DATASETS[args.dataset].folders:
                raise UsageError(f"{args.split} names files, but {args.dataset} has none: write indices")
        if "num_label" in named and args.num_label != len(labels):
            raise UsageError(f"argument --num-label: {args.num_label}, but --split {args.split} has {len(labels)} lines: leave "
                             "the flag out")
        args.num_label = len(labels) - args.num_val
    if args.arch and (found := check_network(args.arch)):
        sums["arch"] = found
    if args.init:
        with about("argument --init"):
            sums["init"] = hashlib.sha256(read_bytes(args.init)).hexdigest()
    return NamedFiles(labels, sums)


@contextmanager
def about(what):
    """Makes a UsageError inside first say what it is about, such as a flag."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None
