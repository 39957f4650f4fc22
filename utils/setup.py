"""What comes before the first step of a run: its data, its network, and what the log says of them."""
from functools import partial

import numpy as np
import torch

from datasets import DataError
from datasets.splits import split_training
from metasemi import learning_rate, meta_gradient, ramp
from models import build_model, dry_run
from models.synchronized import synchronize_batch_norm
from utils import checkpoint
from utils.device import slow_precision
from utils.state import check_same_data, check_same_split, load_data, load_weights


def prepare_data(args, world, device, saved, source, interrupt):
    """Images, their digest, and the indices of labeled, unlabeled and validation images; the same in every process.

    Without meta step and mix-up no unlabeled image is used, and None stands for their indices.
    """
    with world.local_first():           # it may download
        images = load_data(vars(args), device, saved, source, stop=interrupt)
    data = images.digest
    if args.labeled and isinstance(args.labeled[0], str):
        args.labeled = images.indices_of(args.labeled)
    if saved is None:
        labeled, validation = split_training(images.train_labels[:images.num_train], args.num_label, args.num_val,
                                             images.num_classes, args.seed, args.labeled)
        args.num_label = len(labeled)
    else:
        check_same_data(data, saved, "the run that --resume continues", args.data_path)
        check_same_split(args, saved)
        labeled, validation = saved["labeled"].numpy(), saved["validation"].numpy()
    images = images.to(device)
    world.check_same({**data, "labeled images": labeled.tolist(), "validation images": validation.tolist()})
    unlabeled = None
    if not args.no_meta or args.mix_up:
        taken = validation if args.include_labeled else np.concatenate([validation, labeled])
        unlabeled = np.setdiff1d(np.arange(len(images.train_labels)), taken)
        if len(unlabeled) == 0:
            raise DataError(f"argument --num-label: {args.num_label} leaves no unlabeled image: add --include-labeled, "
                            "or train supervised with --no-meta and no --mix-up")
    return images, data, labeled, unlabeled, validation


def prepare_model(args, world, device, dtype, images):
    """A network with its first weights, the same in every process, and warnings about it."""
    method = partial(meta_gradient, method=args.meta_gradient, consistency=args.consistency, dtype=dtype)
    warned = dry_run(args.arch, images.num_classes, images.image_size, device, dtype,
                     None if args.no_meta else method, min(4, args.batch_size // world.size))
    torch.manual_seed(args.seed)
    model = build_model(args.arch, images.num_classes, device)
    if args.init:
        warned = [*warned, *load_first_weights(model, args)]
    world.broadcast(list(model.state_dict().values()))
    if args.sync_bn and world.size > 1:
        synchronize_batch_norm(model, world.all_reduce_mean, world.size)
    return model, warned


def load_first_weights(model, args):
    """Puts the weights of --init into a model.  Returns lines about what is left as it was: the last layer of torchvision's
    networks, if it is for another number of classes.  All else must fit."""
    from torchvision.models import ResNet  # takes a second to load

    weights, own, left = dict(checkpoint.load(args.init, bare=True)["model"]), model.state_dict(), []
    given = weights.get("fc.weight", torch.empty(0))
    if isinstance(model, ResNet) and given.dim() == 2 and len(given) != len(own["fc.weight"]):
        left.append(f"{args.init}: its last layer, fc, is for {len(given):,} classes: that for {len(own['fc.weight']):,} "
                    "starts at random")
        weights |= {name: own[name] for name in ("fc.weight", "fc.bias")}
    load_weights(model, args.arch, {"model": weights}, f"argument --init: {args.init}")
    return left


def describe_run(args, state, images, unlabeled, device, warned):
    """The first lines of the log: data, network, device, and warnings."""
    yield (f"{images.describe()}; {len(state.labeled)} labeled" + ("" if unlabeled is None else f", {len(unlabeled)} unlabeled")
           + (f", {len(state.validation)} for validation" if len(state.validation) else ""))
    if count := len(images.train_labels) - images.num_train:
        yield f"{count:,} images have no class: validation, unlabel-acc and pseudo-acc leave them out"
    yield (f"{args.arch}, {sum(w.numel() for w in state.model.parameters()):,} parameters, {state.sessions[-1]['device']}"
           + (" (no CUDA device is visible)" if args.device == "auto" and device.type == "cpu" else ""))
    if images.source:
        yield f"images {images.source}"
    if images.ignored:
        yield f"ignored: {images.ignored}"
    if args.meta_gradient == "finite-difference" and args.precision == "bfloat16" and not args.no_meta:
        yield ("warning: with --precision bfloat16 a half-step of the finite difference can be less than the resolution of the "
               "weights, and the meta-gradient mostly rounding: take --meta-gradient jvp, or float32")
    yield from filter(None, (cut_short(args), slow_precision(args.precision, device), *warned))


def cut_short(args):
    """What of the schedule lies beyond the last step of a run, and what that means: one line, or None."""
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


def describe_resumption(state, saved, source):
    """Lines about where a run goes on, and what is not as it was before."""
    yield f"resumed at step {state.step} from {source}"
    if "data" not in saved:
        yield f"{source}: of an earlier version, which kept no digest of its images: they could not be compared"
    before, now = state.sessions[-2:]
    for key, value in now.items():
        if key not in ("from_step", "commit") and value != before.get(key):
            yield f"{key} was {before.get(key)} and is {value}: equal to the first part only up to rounding"
