"""The state of a run: everything that makes it that run.  A checkpoint is the `state_dict()` of it, and nothing else.

Throughout, `saved` is a checkpoint as `checkpoint.load` returns it, and `name` what to call it in a message.
"""
import numpy as np
import torch

from utils.device import set_random_state
from utils.errors import Diverged, UsageError, first_line
from utils.experiment import plain_flags
from utils.meters import all_finite

VERSION = 2             # of checkpoints; those of another are refused

# What a checkpoint holds: name -> the type of its value.
COURSE = {"step": int, "seconds": float, "evaluations": list, "sessions": list, "rng": list}       # how far the run has come
SCHEMA = {**COURSE, "best": (float, type(None)), "args": dict, "files": dict, "model": dict, "optimizer": dict,
          "labeled": torch.Tensor, "validation": torch.Tensor, "class_names": list, "data": dict, "left_out": list,
          "mean": torch.Tensor, "std": torch.Tensor, "image_size": int}


class RunState:
    """A run between two steps.

    Attributes are the names in SCHEMA; `model` and `optimizer` are the objects themselves.  files: `NamedFiles.sums`.
    labeled, validation: (N,) int64 indices of training images.  data: the digest of the images.  sessions: a dict for each
    part of the run, with where and by what it was trained.  rng: for each process the states of torch's generators, by type
    of device.
    """

    def __init__(self, args, files, images, data, labeled, validation, model, optimizer):
        """A run before its first step.  args: resolved flags.  images: as `load_dataset` returns them."""
        self.args, self.files, self.model, self.optimizer = plain_flags(args), files, model, optimizer
        self.labeled, self.validation, self.device = labeled, validation, next(model.parameters()).device
        self.select_by = "validation" if len(validation) else "test"
        self.data, self.class_names, self.left_out = data, list(images.class_names), list(images.left_out)
        self.mean, self.std, self.image_size = images.mean, images.std, images.image_size
        self.step, self.seconds, self.evaluations, self.sessions, self.rng = 0, 0.0, [], [], []
        self.finite_at_start = finite_entries(model)

    @property
    def best(self):
        """The highest accuracy so far of the set that selects `model_best.pth`; None before the first evaluation."""
        return max((evaluation[self.select_by] for evaluation in self.evaluations), default=None)

    def state_dict(self):
        """Returns name -> value as in SCHEMA, for `checkpoint.save`."""
        state = {name: getattr(self, name) for name in SCHEMA}
        return state | {"version": VERSION, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved, name):
        """Goes on where a checkpoint ends; the flags are still those of this command, the learning rate, too."""
        load_weights(self.model, self.args["arch"], saved["model"], name)
        try:
            momenta, groups = saved["optimizer"]["state"], self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": momenta, "param_groups": groups})
            fit = all(values["momentum_buffer"].shape == w.shape for w, values in self.optimizer.state.items())
        except Exception:               # torch says by many types what it does not take
            fit = False
        if not fit:
            raise UsageError(f"{name}: its optimizer state does not fit this network")
        for field in COURSE:
            setattr(self, field, saved[field])

    def set_random_state(self, world):
        """Puts torch's generators in the state of this step.  Returns lines about what could not be put back.

        A process that the run did not have before gets a state of its own, a function of (rank, seed, step).
        """
        if world.rank:
            sequence = np.random.SeedSequence([world.rank, self.args["seed"], self.step])
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        if self.step and (world.rank == 0 or len(self.rng) == world.size):
            try:
                return set_random_state(self.rng[world.rank], self.device)
            except Exception as error:          # torch says by many types what it does not take
                raise UsageError(f"the random state of the checkpoint is impossible ({first_line(error)})") from None
        return []

    def add_evaluation(self, scalars):
        """Keeps accuracies, as `evaluation.measure_sets` returns them."""
        self.evaluations.append({"step": self.step} | {tag.removesuffix("/accuracy").replace("/", "_"): value
                                                       for tag, value in scalars.items()})

    def needs_evaluation(self):
        """Returns whether an evaluation is due at this step and was not made."""
        due = self.step > 0 and (self.step % self.args["test_freq"] == 0 or self.step == self.args["total_steps"])
        return due and (not self.evaluations or self.evaluations[-1]["step"] != self.step)

    def is_best(self):
        """Returns whether the first of the best evaluations is that of this step."""
        return bool(self.evaluations) and max(self.evaluations, key=lambda e: e[self.select_by])["step"] == self.step

    def check_finite(self):
        """Raises Diverged unless the weights are finite, where they were so at first; waits for the device once."""
        weights = self.model.state_dict()
        if not all_finite(weights[name] for name in self.finite_at_start):
            raise Diverged(f"the weights are not finite at step {self.step}")


def finite_entries(model):
    """Returns the names of the weights that are finite; the mask of an attention, for example, is not, and may stay so."""
    return [name for name, value in model.state_dict().items() if all_finite([value])]


def load_weights(model, arch, weights, name):
    """Puts the weights of a checkpoint into a model.  Raises UsageError if they do not fit, or are not finite."""
    finite = finite_entries(model)
    try:
        model.load_state_dict(weights)
    except Exception as error:          # torch reports a mismatch by many types
        raise UsageError(f"{name}: its weights do not fit {arch} ({' '.join(str(error).split())[:200]})") from None
    if not all_finite(model.state_dict()[key] for key in finite):
        raise UsageError(f"{name}: its weights are not finite")
