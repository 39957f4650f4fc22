"""What comes before the first step of a run: its data, its network, and what the log says of them."""
import numpy as np
import torch

from datasets import DataError, data_digest, duplicates, load_dataset
from datasets.splits import split_training
from datasets.table import UNLABELED_FOLDER
from models import build_model
from models.synchronized import synchronize_batch_norm
from utils import checkpoint
from utils.device import memory_for_images, slow_precision, why_missing
from utils.errors import UsageError
from utils.experiment import check_same_processes, differing
from utils.flags import defaults
from utils.state import load_weights
from utils.trial import try_network


def prepare_data(args, files, world, device, saved):
    """Returns images, their digest, and the indices of labeled, validation and unlabeled images; the same in every process.

    files: `NamedFiles`.  saved: the checkpoint that the run continues, or None.  Indices are (N,) int64 tensors on the CPU.
    Without meta step and mix-up no unlabeled image is used, and None stands for their indices.  Sets args.num_label.
    """
    with world.local_first():           # it may download
        images = load_images(vars(args), device, saved)
    data, split = data_digest(images), files.labels
    if split and isinstance(split[0], str):
        split = images.indices_of(split)
    if saved is None:
        try:
            labeled, validation = map(torch.from_numpy, split_training(
                images.train_labels[:images.num_train], args.num_label, args.num_val, images.num_classes, args.seed, split))
        except DataError as error:
            if args.num_label != defaults()["num_label"] or not images.train_files or "--num-label" not in str(error):
                raise
            counts = torch.bincount(images.train_labels[:images.num_train])
            raise DataError(f"{error}; {args.num_label:,} is the default, and {images.class_names[counts.argmin()]} has "
                            f"{counts.min():,} images: give another --num-label, or a list by --split, or put images without a "
                            f"class in {UNLABELED_FOLDER}/ beside train/") from None
        args.num_label = len(labeled)
    else:
        check_same_data(data, saved, "the run that --resume continues", args.data_path)
        labeled, validation = saved["labeled"], saved["validation"]
        if split and sorted(split) != sorted([*labeled.tolist(), *validation.tolist()]):
            raise UsageError(f"argument --split: {args.split} is not the split of the run that --resume continues")
    check_same_processes(world, args, files.sums, data, labeled=labeled.tolist(), validation=validation.tolist())
    unlabeled = None
    if not args.no_meta or args.mix_up:
        taken = validation if args.include_labeled else torch.cat([validation, labeled])
        unlabeled = torch.from_numpy(np.setdiff1d(np.arange(len(images.train_labels)), taken.numpy()))
        if len(unlabeled) == 0:
            raise DataError(f"argument --num-label: {args.num_label} leaves no unlabeled image: add --include-labeled, "
                            "or train supervised with --no-meta and no --mix-up")
    return images, data, labeled, validation, unlabeled


def load_images(flags, device, saved=None, **options):
    """Returns the images of a run, as `load_dataset` does; normalized, and without what was left out, as in a checkpoint.

    flags: name -> value, perhaps of a run that is older than a flag.  options: further ones of `load_dataset`.
    Raises DataError for images that are missing or damaged.
    """
    flags = defaults() | flags
    if saved and "left_out" in saved:
        options |= {"statistics": (saved["mean"], saved["std"])}
        if saved["args"].get("skip_corrupt") or not flags["skip_corrupt"]:
            options |= {"left_out": saved["left_out"]}          # else --evaluate looks for what cannot be read in other images
    return load_dataset(flags["dataset"], flags["data_path"], flags["image_size"], flags["flip"], flags["num_workers"],
                        memory=memory_for_images(device), skip_corrupt=flags["skip_corrupt"], num_test=flags["num_test"],
                        **options)


def check_same_data(data, saved, name, path):
    """Raises UsageError if images at `path`, of the digest `data`, are not those of a checkpoint; name: what to call that."""
    if names := differing(data, saved["data"]):
        raise UsageError(f"argument --data-path: {path} is not what {name} was trained on: the {', '.join(names)} differ")


def prepare_model(args, world, device, dtype, images):
    """Returns a network with its first weights, the same in every process, and warnings about it."""
    warned = try_network(args.arch, images.num_classes, images.image_size, device, dtype,
                         None if args.no_meta else args.meta_gradient, args.consistency, args.epsilon,
                         min(4, args.batch_size // world.size))
    torch.manual_seed(args.seed)
    model = build_model(args.arch, images.num_classes, device)
    if args.init:
        warned = [*warned, *load_first_weights(model, args)]
    world.broadcast(list(model.state_dict().values()))
    if args.sync_bn and world.size > 1:
        synchronize_batch_norm(model, world.all_reduce_mean, world.size)
    return model, warned


def load_model(arch, num_classes, device, weights, name):
    """Returns the network of a checkpoint; name: what to call that."""
    model = build_model(arch, num_classes, device)
    load_weights(model, arch, weights, name)
    return model


def load_first_weights(model, args):
    """Puts the weights of --init into a model.  Returns lines about what is left as it was: the last layer of torchvision's
    networks, if it is for another number of classes.  All else must fit."""
    weights, own, left = dict(checkpoint.load(args.init, bare=True)["model"]), model.state_dict(), []
    last = weights.get("fc.weight", torch.empty(0))
    if args.arch in ("resnet18", "resnet50") and last.dim() == 2 and len(last) != len(own["fc.weight"]):
        left.append(f"{args.init}: its last layer, fc, is for {len(last):,} classes: that for {len(own['fc.weight']):,} "
                    "starts at random")
        weights |= {name: own[name] for name in ("fc.weight", "fc.bias")}
    load_weights(model, args.arch, weights, f"argument --init: {args.init}")
    return left


def describe_run(args, state, images, unlabeled, warned):
    """Yields the first lines of the log: data, network, device, plan and warnings."""
    yield (f"{images.describe()}; {len(state.labeled)} labeled" + ("" if unlabeled is None else f", {len(unlabeled)} unlabeled")
           + (f", {len(state.validation)} for validation" if len(state.validation) else ""))
    if count := len(images.train_labels) - images.num_train:
        yield f"{count:,} images have no class: validation, unlabel-acc and pseudo-acc leave them out"
    yield (f"{args.arch}, {sum(w.numel() for w in state.model.parameters()):,} parameters, {state.sessions[-1]['device']}"
           + (f" ({why_missing()})" if args.device == "auto" and state.device.type == "cpu" else ""))
    if images.where:
        yield f"images {images.where}"
    yield from describe_missing(images)
    yield from (f"warning: {line}" for line in images.warnings)
    if count := duplicates(images):
        yield f"warning: {count:,} of the test images are also among the training images, pixel by pixel"
    if args.meta_gradient == "finite-difference" and args.precision == "bfloat16" and not args.no_meta:
        yield ("warning: with --precision bfloat16 a half-step of the finite difference can be less than the resolution of the "
               "weights, and the meta-gradient mostly rounding: take --meta-gradient jvp, or float32")
    yield from filter(None, (cut_short(args), slow_precision(args.precision, state.device), *warned))
    line, seen = f"{args.total_steps:,} steps of {args.batch_size}", args.total_steps * args.batch_size
    if unlabeled is None:
        yield f"{line} labeled images: {seen / len(state.labeled):,.1f} passes over the labeled ones"
    else:
        yield (f"{line} + {args.batch_size} images: {seen / len(state.labeled):,.1f} passes over the labeled and "
               f"{seen / len(unlabeled):,.1f} over the unlabeled ones")


def describe_missing(images):
    """Yields lines about files that are not among the images of a folder."""
    if images.ignored:
        yield f"ignored: {images.ignored}"
    for name, reason in images.left_out.items():
        yield f"left out: {reason or name}"


def cut_short(args):
    """Returns one line about what of the schedule lies beyond the last step of a run, or None."""
    ramp = 0 if args.no_meta else args.warmup if args.ramp is None else args.ramp
    late = [f"{name} {end}" for name, end in (("--warmup", args.warmup), ("--ramp", ramp)) if end > args.total_steps]
    if args.schedule == "step" and (beyond := [step for step in args.milestones if step >= args.total_steps]):
        late.append(f"--milestones {', '.join(map(str, beyond))}")
    return f"warning: --total-steps {args.total_steps} ends before {', '.join(late)}" if late else None


def describe_resumption(state, where):
    """Yields lines about where a run goes on, and what is not as it was before."""
    yield f"resumed at step {state.step} from {where}"
    before, now = state.sessions[-2:]
    for key, value in now.items():
        if key not in ("from_step", "commit") and value != before.get(key):
            yield f"{key} was {before.get(key)} and is {value}: equal to the first part only up to rounding"
