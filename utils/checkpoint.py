"""Checkpoints that a kill cannot break and that run no code when loaded.

A save writes a temporary file, syncs it and renames it; the generation before stays as `checkpoint.prev.pth`.
A load checks every byte against the sums of the archive, then reads tensors and plain types only.
"""
import pickle
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from utils.cli import UsageError, first_line
from utils.files import BEST, CHECKPOINT, PREVIOUS, replacing
from utils.flags import unnamed_code
from utils.state import CheckpointError, find_fault


def save(state, folder):
    """Replaces the last checkpoint of a run folder by `state`, a dict of tensors and plain types; keeps the one before."""
    with replacing(Path(folder, CHECKPOINT), backup=Path(folder, PREVIOUS)) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:       # torch closing the archive, after a write that the disk refused
            raise error.__context__ or error from None


def load(path, bare=False):
    """The dict in a checkpoint file, on the CPU.

    bare: whether it may be a bare state dict, too, or another program's checkpoint with one under "state_dict", as a dict
        with nothing but "model".

    Raises CheckpointError if the file is missing, damaged, or holds more than tensors and plain types; the message names a
    checkpoint beside it that is intact.
    """
    try:
        return load_alone(path, bare)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{intact_beside(path)}") from None


def intact_beside(path):
    """"; PATH of step N is intact", of another checkpoint in the folder of one that cannot be read; "" if there is none."""
    for name in (CHECKPOINT, PREVIOUS, BEST):
        other = Path(path).with_name(name)
        with suppress(CheckpointError):
            return f"; {other} of step {load_alone(other)['step']} is intact"
    return ""


def load_alone(path, bare=False):
    """As `load`, without a look beside the file."""
    state = read(path)
    weights = state.get("state_dict", state) if bare and isinstance(state, dict) else None
    if isinstance(weights, dict) and weights and all(isinstance(w, torch.Tensor) for w in weights.values()):
        return {"model": weights}
    if fault := find_fault(state):
        raise CheckpointError(f"{path} is {'neither a state dict nor' if bare else 'not'} a checkpoint of train_meta.py: "
                              + fault)
    return state


def read(path):
    """What torch.save wrote into a file, on the CPU; raises CheckpointError unless that can be read safely.

    What comes back takes no more memory than the file: there is no tensor in it that is expanded, and nothing twice.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint (a missing file never means a fresh start)")
        if not path.is_file():
            raise CheckpointError(f"{path} is not a regular file: give a file that a run has left")
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise CheckpointError(f"{path} is not a checkpoint that can be read safely: it is larger unpacked")
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")             # of torch, about what is refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
        if fault := find_bomb(state):
            raise CheckpointError(f"{path} is not a checkpoint that can be read safely: {fault}")
        return state
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is not a checkpoint that can be read safely: it holds more than tensors and "
                              "plain types, which could run code") from None
    except Exception as error:          # whatever a damaged archive makes the readers raise
        raise CheckpointError(f"{path} is not a checkpoint that can be read safely ({first_line(error)})") from None


def find_bomb(state):
    """What makes a small file into something large, or into tensors that cannot be written to; or None."""
    todo, seen = [state], set()
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
                return "it holds a tensor that is not dense"
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                return f"it holds an expanded tensor of shape {tuple(value.shape)}"
        elif isinstance(value, (dict, list, tuple)) and value:
            if id(value) in seen:       # lists of lists of lists, each twice, are endless to whoever goes through them
                return "a part of it occurs twice"
            seen.add(id(value))
            todo += [*value, *value.values()] if isinstance(value, dict) else value
    return None


def check_arch(saved, path, given):
    """Raises UsageError unless the command line allows the network of a checkpoint to be built; saved: its args.

    given: name -> SHA-256 of its file, of the networks of the command line; the sum is None for those of this repository.
    The network must be one of them, its file unchanged; with none given, it may be any but one in a file.
    """
    name = saved["arch"]
    if ":" in name and not given:
        raise unnamed_code(path, name)
    if given and name not in given:
        raise UsageError(f"argument --arch: {', '.join(given)}, but {path} was trained with {name}")
    if given and given[name] != saved.get("arch_sha256"):
        raise UsageError(f"argument --arch: {name} has changed since {path} was trained (SHA-256 {saved.get('arch_sha256')} "
                         f"then, {given[name]} now): restore the file")


def load_last(folder, warn=lambda message: None):
    """The newest readable checkpoint of a run folder and why it was taken, or None if the folder has none.

    A damaged last checkpoint falls back to the one before, with a line to `warn`; if both are, CheckpointError.
    """
    paths = [path for path in (Path(folder, CHECKPOINT), Path(folder, PREVIOUS)) if path.exists()]
    for path in paths:
        why = "the newest generation" if path == paths[0] else f"since {CHECKPOINT} is damaged"
        if path == paths[-1]:
            return load(path), path, f"{path.name}, {why}"
        try:
            return load_alone(path), path, f"{path.name}, {why}"
        except CheckpointError as error:
            warn(f"{error}; falling back to {PREVIOUS}")
    return None


def describe_last(folder):
    """For the last line of a run that failed: what it can continue from."""
    try:
        last = load_last(folder)
    except CheckpointError as error:
        return str(error)
    if last is None:
        return intact_beside(Path(folder, CHECKPOINT)).removeprefix("; ") or "no checkpoint was saved before"
    return f"{last[1]} of step {last[0]['step']} is intact"
