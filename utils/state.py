"""The state of a run: everything that makes it that run.  A checkpoint is the `state_dict()` of it, and nothing else.

Training, `--evaluate` and `plot_features.py` open a checkpoint with its data and its network by `load_data` and `load_model`.
Throughout, `saved` is a checkpoint as `checkpoint.load` returns it, and `source` what to call it where it does not fit.
"""
import json

import numpy as np
import torch

from datasets import load_dataset
from datasets.splits import check_split
from models import build_model
from utils.cli import UsageError, first_line
from utils.device import memory_for_images
from utils.failure import Diverged
from utils.flags import declared, experiment
from utils.metrics import all_finite
from utils.records import differing

# What a checkpoint holds: name -> type.
COURSE = {              # how far the run has come
    "step": int, "seconds": float, "evaluations": list, "best": (float, type(None)), "sessions": list,
    "rng": torch.Tensor, "cuda_rng": (torch.Tensor, type(None)), "other_rng": list}
DATA = {                # the images that it is trained on
    "labeled": torch.Tensor, "validation": torch.Tensor, "labels_sha256": str, "class_names": list, "data": dict,
    "mean": torch.Tensor, "std": torch.Tensor, "image_size": int}
FIELDS = {**COURSE, **DATA, "args": dict, "model": dict, "optimizer": dict}
ABSENT = {"data": {}, "other_rng": []}          # what stands for a field that earlier versions did not have
PLAIN = ("args", "sessions", "seconds", "evaluations", "best", "class_names")
ARGS = {"dataset": str, "data_path": str, "arch": str, "image_size": int, "flip": bool, "milestones": list}
MOST_STEPS, MOST_PIXELS = 10 ** 15, 1024        # as the command line has them


class CheckpointError(UsageError):
    """A checkpoint that is missing, damaged or not one of this program; the message names it."""


class RunState:
    """A run between two steps.

    Attributes are the names in FIELDS; `model` and `optimizer` are the objects themselves.  labeled and validation:
    (N,) int64 indices of training images.  best: the highest accuracy so far of the set `select_by`, which selects
    `model_best.pth`.  sessions: a dict for each part of the run, with where and by what it was trained.
    """

    def __init__(self, args, images, data, labeled, validation, model, optimizer):
        """A run before its first step.  args: resolved flags.  images: as `load_dataset` returns them, data: their digest."""
        self.args, self.model, self.optimizer = experiment(args), model, optimizer
        self.labeled, self.validation = torch.from_numpy(labeled), torch.from_numpy(validation)
        self.select_by = "validation" if len(validation) else "test"
        self.data, self.labels_sha256, self.class_names = data, images.labels_sha256, list(images.class_names)
        self.mean, self.std, self.image_size = images.mean, images.std, images.image_size
        self.step, self.seconds, self.evaluations, self.best, self.sessions = 0, 0.0, [], None, []
        self.rng, self.cuda_rng, self.other_rng = torch.get_rng_state(), None, []
        # An infinite parameter or buffer, such as the mask of an attention, may stay so.
        self.finite_at_start = {name for name, value in model.state_dict().items() if all_finite([value])}

    def state_dict(self):
        """name -> value as in FIELDS, for `checkpoint.save`."""
        state = {name: getattr(self, name) for name in FIELDS}
        return state | {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved, source):
        """Goes on where a checkpoint ends; the flags are still those of this command, the learning rate, too."""
        load_weights(self.model, self.args["arch"], saved, source)
        load_momenta(self.optimizer, saved, source)
        for name in COURSE:
            setattr(self, name, saved.get(name, ABSENT.get(name)))

    def set_random_state(self, world, device):
        """Torch's generators as they were at this step.  A process that the run did not have before gets a state of its
        own, a function of (rank, seed, step)."""
        if world.rank:
            sequence = np.random.SeedSequence([world.rank, self.args["seed"], self.step])
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        states = [[self.rng, self.cuda_rng], *self.other_rng]
        if self.step and (world.rank == 0 or len(states) == world.size):
            rng, cuda_rng = states[world.rank]
            torch.set_rng_state(rng)
            if device.type == "cuda" and cuda_rng is not None:
                torch.cuda.set_rng_state(cuda_rng, device)

    def get_random_state(self, world, device):
        """Takes the states of torch's generators, those of all processes of a world, into the state of the run."""
        (self.rng, self.cuda_rng), *self.other_rng = world.all_gather_object(
            [torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None])

    def add_evaluation(self, scalars):
        """Keeps accuracies, as `Evaluator.evaluate` returns them."""
        self.evaluations.append({"step": self.step} | {tag.removesuffix("/accuracy").replace("/", "_"): value
                                                       for tag, value in scalars.items()})
        accuracy = scalars[f"{self.select_by}/accuracy"]
        if self.best is None or accuracy > self.best:
            self.best = accuracy

    def lacks_evaluation(self):
        """Whether a run before ended at a step with an evaluation, but without that."""
        due = self.step and (self.step % self.args["test_freq"] == 0 or self.step == self.args["total_steps"])
        return bool(due) and (not self.evaluations or self.evaluations[-1]["step"] != self.step)

    def is_best(self):
        """Whether the first of the best evaluations is that of this step."""
        return bool(self.evaluations) and max(self.evaluations, key=lambda e: e[self.select_by])["step"] == self.step

    def check_finite(self):
        """Raises Diverged unless the weights are finite, where they were so at first; waits for the device once."""
        weights = self.model.state_dict()
        if not all_finite(weights[name] for name in self.finite_at_start):
            raise Diverged(f"the weights are not finite at step {self.step}")


def find_fault(state):
    """What keeps a loaded value from being the state of a run, or None."""
    if not isinstance(state, dict):
        return f"it holds a {type(state).__name__}"
    state = ABSENT | state
    for name, kind in FIELDS.items():
        if name not in state:
            return f"it has no {name}"
        if not isinstance(state[name], kind):
            return f"its {name} is a {type(state[name]).__name__}"
    try:
        json.dumps([state[name] for name in PLAIN], allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return f"its {', '.join(PLAIN)} are not all plain and finite"
    if not 0 <= state["step"] <= MOST_STEPS:
        return "its step is impossible"
    args = state["args"]
    for name, kind in ARGS.items():
        if not isinstance(args.get(name), kind):
            return f"its args have no {name}"
    if not all(isinstance(step, int) for step in args["milestones"]):
        return "its milestones are not steps"
    precision = declared()["precision"]
    if args.get("precision", precision.default) not in precision.choices:
        return "its precision does not exist"
    if not all(isinstance(text, str) for text in state["data"].values()):
        return "its data are not names and texts"
    if not all(0 < size <= MOST_PIXELS for size in (state["image_size"], args["image_size"])):
        return f"its images are not of 1 to {MOST_PIXELS} pixels"
    for name in ("labeled", "validation"):
        index = state[name]
        if index.dtype != torch.int64 or index.dim() != 1 or len(index.unique()) < len(index) or (index < 0).any():
            return f"its {name} is not a list of different indices"
    if len(state["labeled"]) == 0:
        return "it has no labeled image"
    if any(state[name].shape != (3,) or state[name].dtype != torch.float32 or state[name].requires_grad
           or not state[name].isfinite().all() for name in ("mean", "std")) or not (state["std"] > 0).all():
        return "its mean and std are not of three channels"
    if not all(isinstance(w, torch.Tensor) for w in state["model"].values()):
        return "its model is not a state dict"
    if not all(isinstance(e, dict) and isinstance(e.get("step"), int) and isinstance(e.get("test"), float)
               and isinstance(e.get("validation", 0.0), float) for e in state["evaluations"]):
        return "its evaluations are not accuracies"
    if not state["sessions"] or not all(isinstance(session, dict) for session in state["sessions"]):
        return "it does not say where it was trained"
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in state["other_rng"]):
        return "its other random states are none"
    for rng, cuda_rng in ([state["rng"], state["cuda_rng"]], *state["other_rng"]):
        try:
            torch.Generator().set_state(rng)
        except (RuntimeError, TypeError):
            return "its random state is impossible"
        if cuda_rng is not None and not (isinstance(cuda_rng, torch.Tensor) and cuda_rng.dtype == torch.uint8
                                         and cuda_rng.shape == (16,) and cuda_rng[8] % 4 == 0):     # seed, offset: by fours
            return "its random state is impossible"
    return None


def load_data(flags, device, saved, source, **options):
    """The images of a run, as `load_dataset` returns them; normalized with the statistics of a checkpoint, if there is one.

    flags: name -> value, of those that say which images, and how they are read.  options: further ones of `load_dataset`.
    Raises DataError for images that are missing or damaged, or too few for the split of the checkpoint.
    """
    images = load_dataset(flags["dataset"], flags["data_path"], flags["image_size"], flags.get("flip", False),
                          flags["num_workers"], memory=memory_for_images(device), skip_corrupt=flags["skip_corrupt"],
                          statistics=(saved["mean"], saved["std"]) if saved and "mean" in saved else None, **options)
    if saved and "labeled" in saved:
        check_split(saved["labeled"].numpy(), saved["validation"].numpy(), images.num_train, source)
    return images


def load_model(arch, images, device, saved, source):
    """The network of a checkpoint for the classes of some images."""
    model = build_model(arch, images.num_classes, device)
    load_weights(model, arch, saved, source)
    return model


def load_weights(model, arch, saved, source):
    """Puts the weights of a checkpoint into a model.  Raises CheckpointError for what does not fit, or is finite no more."""
    finite = [name for name, value in model.state_dict().items() if all_finite([value])]
    try:
        model.load_state_dict(saved["model"])
    except Exception as error:          # torch reports a mismatch by many types
        misfit = find_misfit(model.state_dict(), saved["model"]) or " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source}: its weights do not fit {arch} ({misfit})") from None
    if not all_finite(model.state_dict()[name] for name in finite):
        raise CheckpointError(f"{source}: its weights are not finite")


def find_misfit(own, weights):
    """Names of what weights lack, have beyond those of a model, `own`, or have in another shape; "" if they fit."""
    odd = {"missing": own.keys() - weights.keys(), "unexpected": weights.keys() - own.keys(),
           "of another shape": {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}}
    return "; ".join(f"{what}: {', '.join(sorted(map(str, names))[:4])}" + f" and {len(names) - 4} more" * (len(names) > 4)
                     for what, names in odd.items() if names)


def load_momenta(optimizer, saved, source):
    """Puts the momenta of a checkpoint into an optimizer.  Raises CheckpointError for what does not fit."""
    try:
        shapes = [w.shape for group in optimizer.param_groups for w in group["params"]]
        momenta = saved["optimizer"]["state"]
        for i, values in momenta.items():
            momentum = values["momentum_buffer"]
            if momentum is not None and momentum.shape != shapes[i]:
                raise ValueError(f"momentum {i} has shape {tuple(momentum.shape)}")
        optimizer.load_state_dict({"state": momenta, "param_groups": optimizer.state_dict()["param_groups"]})
    except Exception as error:
        raise CheckpointError(f"{source}: its optimizer state does not fit this network ({first_line(error)})") from None


def data_of(saved):
    """The digest of the data of a checkpoint; one of an earlier version has only a part of it."""
    return {"class names": "/".join(map(str, saved["class_names"])), "training labels": saved["labels_sha256"],
            **saved.get("data", {})}


def check_same_split(args, saved):
    """Refuses indices of --split that are not those of a checkpoint; names are not compared."""
    then = sorted(saved["labeled"].tolist() + saved["validation"].tolist())
    if args.labeled and args.labeled != then and not isinstance(args.labeled[0], str):
        raise UsageError(f"argument --split: {args.split} is not the split of the run that --resume continues")


def check_same_data(data, saved, source, path):
    """Refuses images at `path`, of the digest `data`, that are not those of a checkpoint."""
    names = differing(data, data_of(saved))
    if names:
        raise UsageError(f"argument --data-path: {path} is not what {source} was trained on: the {', '.join(names)} differ")
