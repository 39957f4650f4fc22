"""Checkpoints that a kill cannot break and that run no code when loaded.

A save writes a temporary file, syncs it and renames it; the generation before stays as `checkpoint.prev.pth`.
A load checks every byte against the sums of the archive, then reads tensors and plain types only, and checks their names and
types by the schema of `utils.state`.
"""
import io
import os
import pickle
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from utils.errors import UsageError, first_line
from utils.files import BEST, CHECKPOINT, PREVIOUS, read_bytes, replacing
from utils.flags import parse_again
from utils.state import SCHEMA, VERSION

NAMES = (CHECKPOINT, PREVIOUS, BEST)        # of the checkpoints in a run folder, the newest first


def save(state, folder):
    """Replaces the last checkpoint of a run folder by `state`, a dict of tensors and plain types; keeps the one before."""
    with replacing(Path(folder, CHECKPOINT), backup=Path(folder, PREVIOUS)) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:       # torch closing the archive, after a write that the disk refused
            raise error.__context__ or error from None


def load(path, bare=False):
    """Returns the dict in a checkpoint file, on the CPU.

    Raises UsageError if the file is missing, damaged, or holds more than tensors and plain types; in a run folder the message
    names a checkpoint that is intact.

    bare: whether it may be a bare state dict, too, or another program's checkpoint with one under "state_dict": then the dict
        has nothing but "model".
    """
    try:
        return load_alone(Path(path), bare)
    except UsageError as error:
        beside = f"; {describe_last(Path(path).parent)}" if Path(path).name in NAMES else ""
        raise UsageError(f"{error}{beside}") from None


def load_last(folder, warn=lambda message: None):
    """Returns the newest readable checkpoint of a run folder and its path, or None if the folder has none.

    A damaged last checkpoint falls back to the one before, with a line to `warn`; if both are, UsageError.
    """
    paths = [path for path in (Path(folder, CHECKPOINT), Path(folder, PREVIOUS)) if path.exists()]
    for path in paths:
        try:
            return load(path), path
        except UsageError as error:
            if path == paths[-1]:
                raise
            warn(f"{error}; falling back to {PREVIOUS}")
    return None


def describe_last(folder):
    """Returns a line about the newest checkpoint of a run folder that is intact: what a run that failed can continue from."""
    paths = [Path(folder, name) for name in NAMES if os.path.exists(Path(folder, name))]
    for path in paths:
        with suppress(UsageError):
            return f"{path} of step {load_alone(path)['step']} is intact"
    return "no checkpoint is intact" if paths else "no checkpoint was saved before"


def load_alone(path, bare=False):
    """Returns what `load` does; its errors do not look beside the file."""
    content = read(path)
    if bare and isinstance(content, dict):
        weights = content.get("state_dict", content)
        if isinstance(weights, dict) and weights and all(isinstance(w, torch.Tensor) for w in weights.values()):
            return {"model": weights}
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(version, int) or version != VERSION:
        raise UsageError(f"{path} is {'neither a state dict nor' if bare else 'not'} a checkpoint of train_meta.py, "
                         f"version {VERSION}: one of another version needs that version of the program")
    if wrong := next((name for name, kind in SCHEMA.items() if not isinstance(content.get(name, ...), kind)), None):
        raise UsageError(f"{path} is damaged: its {wrong} is missing or impossible")
    parse_again(content["args"], path)
    return content


def read(path):
    """Returns what torch.save wrote into a file, on the CPU; raises UsageError unless that can be read safely."""
    content = read_bytes(path)
    try:
        if damaged := zipfile.ZipFile(io.BytesIO(content)).testzip():
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # of torch, about what is refused below
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(f"{path} is not a checkpoint that can be read safely: it holds more than tensors and plain types, "
                         "which could run code") from None
    except Exception as error:          # whatever a damaged archive makes the readers raise
        raise UsageError(f"{path} is not a checkpoint that can be read safely ({first_line(error)})") from None
