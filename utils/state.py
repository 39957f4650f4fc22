"""The state of a run: everything that makes it that run.  A checkpoint is the `state_dict()` of it, and nothing else.

Throughout, `saved` is a checkpoint as `checkpoint.load` returns it, and `name` what to call it in a message.
"""
import numpy as np
import torch

from utils.device import get_random_state, set_random_state
from utils.errors import CheckpointError, Diverged, first_line
from utils.experiment import plain_flags
from utils.meters import all_finite

VERSION = 2             # of checkpoints; those of another are refused

# What a checkpoint holds: name -> the type of its value.
COURSE = {              # how far the run has come
    "step": int, "seconds": float, "evaluations": list, "best": (float, type(None)), "sessions": list, "rng": list}
DATA = {                # the images that it is trained on
    "labeled": torch.Tensor, "validation": torch.Tensor, "class_names": list, "data": dict, "left_out": list,
    "mean": torch.Tensor, "std": torch.Tensor, "image_size": int}
SCHEMA = {**COURSE, **DATA, "args": dict, "files": dict, "model": dict, "optimizer": dict}


class RunState:
    """A run between two steps.

    Attributes are the names in SCHEMA; `model` and `optimizer` are the objects themselves.  labeled and validation:
    (N,) int64 indices of training images.  best: the highest accuracy so far of the set `select_by`, which selects
    `model_best.pth`.  sessions: a dict for each part of the run, with where and by what it was trained.  rng: for each process
    the states of torch's generators, by type of device.
    """

    def __init__(self, args, files, images, data, labeled, validation, model, optimizer):
        """A run before its first step.

        args: resolved flags.  files: `NamedFiles.sums`.  images: as `load_dataset` returns them, data: their digest.  labeled,
        validation: (N,) int64 tensors.
        """
        self.args, self.files, self.model, self.optimizer = plain_flags(args), files, model, optimizer
        self.labeled, self.validation = labeled, validation
        self.select_by = "validation" if len(validation) else "test"
        self.data, self.class_names, self.left_out = data, list(images.class_names), list(images.left_out)
        self.mean, self.std, self.image_size = images.mean, images.std, images.image_size
        self.step, self.seconds, self.evaluations, self.best, self.sessions, self.rng = 0, 0.0, [], None, [], []
        # An infinite parameter or buffer, such as the mask of an attention, may stay so.
        self.finite_at_start = {name for name, value in model.state_dict().items() if all_finite([value])}

    def state_dict(self):
        """Returns name -> value as in SCHEMA, for `checkpoint.save`."""
        state = {name: getattr(self, name) for name in SCHEMA}
        return state | {"version": VERSION, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved, name):
        """Goes on where a checkpoint ends; the flags are still those of this command, the learning rate, too."""
        load_weights(self.model, self.args["arch"], saved["model"], name)
        load_momenta(self.optimizer, saved, name)
        for field in COURSE:
            setattr(self, field, saved[field])

    def set_random_state(self, world, device):
        """Puts torch's generators in the state of this step.  Returns lines about what could not be put back.

        A process that the run did not have before gets a state of its own, a function of (rank, seed, step).
        """
        if world.rank:
            sequence = np.random.SeedSequence([world.rank, self.args["seed"], self.step])
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        if self.step and (world.rank == 0 or len(self.rng) == world.size):
            try:
                return set_random_state(self.rng[world.rank], device)
            except Exception as error:          # torch says by many types what it does not take
                raise CheckpointError(f"the random state of the checkpoint is impossible ({first_line(error)})") from None
        return []

    def get_random_state(self, world, device):
        """Takes the states of torch's generators, those of all processes of a world, into the state of the run."""
        self.rng = world.all_gather_object(get_random_state(device))

    def add_evaluation(self, scalars):
        """Keeps accuracies, as `Evaluator.evaluate` returns them.  Returns whether they are the best so far."""
        self.evaluations.append({"step": self.step} | {tag.removesuffix("/accuracy").replace("/", "_"): value
                                                       for tag, value in scalars.items()})
        accuracy = scalars[f"{self.select_by}/accuracy"]
        better = self.best is None or accuracy > self.best
        if better:
            self.best = accuracy
        return better

    def lacks_evaluation(self):
        """Returns whether an evaluation is due at this step and was not made."""
        due = self.step and (self.step % self.args["test_freq"] == 0 or self.step == self.args["total_steps"])
        return bool(due) and (not self.evaluations or self.evaluations[-1]["step"] != self.step)

    def is_best(self):
        """Returns whether the first of the best evaluations is that of this step."""
        return bool(self.evaluations) and max(self.evaluations, key=lambda e: e[self.select_by])["step"] == self.step

    def check_finite(self):
        """Raises Diverged unless the weights are finite, where they were so at first; waits for the device once."""
        weights = self.model.state_dict()
        if not all_finite(weights[name] for name in self.finite_at_start):
            raise Diverged(f"the weights are not finite at step {self.step}")


def load_weights(model, arch, weights, name):
    """Puts the weights of a checkpoint into a model.  Raises CheckpointError if they do not fit, or are not finite."""
    finite = [key for key, value in model.state_dict().items() if all_finite([value])]
    try:
        model.load_state_dict(weights)
    except Exception as error:          # torch reports a mismatch by many types
        misfit = find_misfit(model.state_dict(), weights) or " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name}: its weights do not fit {arch} ({misfit})") from None
    if not all_finite(model.state_dict()[key] for key in finite):
        raise CheckpointError(f"{name}: its weights are not finite")


def find_misfit(own, weights):
    """Returns the names of missing, unexpected and misshapen weights beside those of a model, `own`; "" if they fit."""
    odd = {"missing": own.keys() - weights.keys(), "unexpected": weights.keys() - own.keys(),
           "of another shape": {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}}
    return "; ".join(f"{what}: {', '.join(sorted(map(str, names))[:4])}" + f" and {len(names) - 4} more" * (len(names) > 4)
                     for what, names in odd.items() if names)


def load_momenta(optimizer, saved, name):
    """Puts the momenta of a checkpoint into an optimizer.  Raises CheckpointError if they do not fit."""
    try:
        shapes = [w.shape for group in optimizer.param_groups for w in group["params"]]
        momenta = saved["optimizer"]["state"]
        for i, values in momenta.items():
            momentum = values["momentum_buffer"]
            if momentum is not None and momentum.shape != shapes[i]:
                raise ValueError(f"momentum {i} has shape {tuple(momentum.shape)}")
        optimizer.load_state_dict({"state": momenta, "param_groups": optimizer.state_dict()["param_groups"]})
    except Exception as error:
        raise CheckpointError(f"{name}: its optimizer state does not fit this network ({first_line(error)})") from None
