"""A trial of a network of the user's own: what would make a run wrong, or its checkpoint useless, is said before it starts.

A trial has instances of its own.  It leaves random states as they were, and keeps nothing.
"""
import io
import random
import re
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

import metasemi
from datasets import DataError
from metasemi.arguments import check_logits
from metasemi.check import check_passes, same
from models import NetworkError, build_model, is_custom
from models.custom import place_in, where
from utils.errors import Diverged, RunFailure, UsageError, is_out_of_memory


def try_network(name, num_classes, image_size, device, dtype=None, method=None, consistency="mse", epsilon=1e-2, batch=4,
                trains=True):
    """Tries a network on `batch` random images; networks of this repository only with one.  Returns warnings, a list of lines.

    dtype: for autocast, or None.  method: of the meta-gradient; None: no meta step.  trains: whether it is to be trained; if
    not, it is only to give logits.

    Raises NetworkError if forward(x) does not give logits (B, K) in both modes or changes x, if `metasemi.check_model` finds
    the meta-gradient wrong, or if a fresh network with the weights of a trained one does not do the same.
    """
    if not is_custom(name) and batch > 1:
        return []
    with ExitStack() as afterwards:
        afterwards.callback(random.setstate, random.getstate())
        afterwards.callback(np.random.set_state, np.random.get_state())
        afterwards.enter_context(torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type))
        seed(1)
        x_l, x_u = torch.randn(2, batch, 3, image_size, image_size, device=device)
        y_l = torch.arange(batch, device=device) % num_classes
        model = build_model(name, num_classes, device)
        warnings = check_answers(name, model, x_l, num_classes, dtype)
        if is_custom(name) and trains:
            options = {"method": method, "consistency": consistency, "epsilon": epsilon}
            check_method(name, model, x_l, y_l, x_u, options)
            warnings += check_training(name, model, build_model(name, num_classes, device), x_l, y_l, x_u, dtype, options)
    return warnings


def seed(number):
    """Seeds all generators on which a network may draw."""
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


@contextmanager
def network_errors(name, what, remedy=""):
    """Makes a NetworkError of whatever else is raised inside: `what` failed, where, and the remedy."""
    try:
        yield
    except NetworkError:
        raise
    except (Exception, SystemExit) as error:
        remedy = ": take a larger --batch-size" if "1 value per channel" in str(error) else remedy
        raise NetworkError(f"{name} fails {what}: {where(error, name)}{remedy}") from None


@torch.no_grad()
def logits_of(model, x, dtype):
    """Returns the logits (B, K) of a model for x (B, ...); dtype: for autocast, or None."""
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        return check_logits(model(x), x, "training" if model.training else "evaluation")


def check_answers(name, model, images, num_classes, dtype):
    """Returns warnings; raises NetworkError unless forward(x) gives logits (B, K) and leaves x as it was."""
    warnings = []
    for mode in ("evaluation", "training"):
        x = images.clone()
        with network_errors(name, f"in {mode} mode on images {tuple(x.shape)}"):
            logits = logits_of(model.train(mode == "training"), x, dtype)
        if logits.shape[1] != num_classes:
            raise NetworkError(f"{name} gives {logits.shape[1]} logits for an image: expected one for each of {num_classes} "
                               "classes")
        if not torch.equal(x, images):
            raise NetworkError(f"{name} changes its input in {mode} mode, which other passes see, too: let its first operation "
                               "not be in place")
        if not warnings and (logits >= 0).all() and ((logits.float().sum(dim=1) - 1).abs() < 1e-2).all():
            warnings.append(f"warning: {name} gives probabilities, rows in [0, 1] that sum to one: the losses take logits, so "
                            "leave its softmax out")
    return warnings


def check_method(name, model, x_l, y_l, x_u, options):
    """Raises NetworkError unless the meta-gradient of a model is right, or without a method its passes in evaluation mode."""
    with network_errors(name, "in the check of its meta-gradient"):
        try:
            if options["method"]:
                metasemi.check_model(model, x_l, y_l, x_u, **options)
            else:
                check_passes(model, x_l)
        except ValueError as error:
            if place_in(error, name):
                raise
            said = re.sub("method='([a-z-]+)'$", r"--meta-gradient \1", str(error))
            raise NetworkError(f"{name}: {said}") from None


def check_training(name, model, fresh, x_l, y_l, x_u, dtype, options):
    """Trains a model for two steps, and puts its weights into a fresh one by way of a file; returns warnings.

    Raises NetworkError unless that works and the two then give the same logits.
    """
    seed(3)
    with network_errors(name, "in a step of training", ": take --precision float32" if dtype else ""):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        for _ in range(2):
            metasemi.training_step(model, optimizer, x_l, y_l, x_u, alpha=0.01, beta=0.01, dtype=dtype,
                                   meta=options["method"] is not None, **options)
    after, file = (random.random(), np.random.random()), io.BytesIO()
    seed(3)
    warnings = [] if after == (random.random(), np.random.random()) else [
        f"warning: {name} draws random numbers from Python or NumPy: a resumed run continues with those of torch alone"]
    with network_errors(name, "when it is saved and loaded"):
        torch.save(model.state_dict(), file)
        weights = torch.load(io.BytesIO(file.getvalue()), map_location=x_l.device, weights_only=True)
    if odd := [key for key, value in weights.items() if not isinstance(value, torch.Tensor)]:
        raise NetworkError(f"{name} has the extra state {odd[0]}: a checkpoint keeps tensors alone, so make it a buffer")
    try:
        fresh.load_state_dict(weights)
    except Exception as error:
        raise NetworkError(f"{name} cannot load the weights of a run ({' '.join(str(error).split())}): make all parameters and "
                           "buffers in __init__, in their final shapes") from None
    for mode in ("evaluation", "training"):
        answers = []
        with network_errors(name, f"in {mode} mode once it was saved and loaded"):
            for network in (model, fresh):
                seed(4)             # not as before the first pass: what the model drew there is to be something else now
                answers.append(logits_of(network.train(mode == "training"), x_u, dtype))
        if not same(*answers, 0 if x_u.device.type == "cpu" else 1e-2):
            raise NetworkError(f"{name} gives other logits in {mode} mode once it was saved and loaded, so no run could be "
                               "resumed: keep what training changes in its state_dict()")
    return warnings


@contextmanager
def network_failures(name, step=None):
    """Makes a RunFailure of what the custom network `name` raises inside; errors of the data, the memory, the other
    processes or a network of this repository stay what they are, and so do logits that are not finite."""
    try:
        yield
    except (Exception, SystemExit) as error:
        others = isinstance(error, (DataError, Diverged, NetworkError, RunFailure, UsageError))
        if not is_custom(name) or others or is_out_of_memory(error) or isinstance(error, OSError) and not place_in(error, name):
            raise
        raise RunFailure(f"{name} fails" + f" at step {step}" * (step is not None) + f": {where(error, name)}") from error
