"""Checkpoints that a kill cannot break and that run no code when loaded.

A save writes a temporary file, syncs it and renames it; the generation before stays as `checkpoint.prev.pth`.
A load checks every byte against the sums of the archive, then reads tensors and plain types only.
"""
import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from utils.cli import UsageError

NAME, PREVIOUS, BEST = "checkpoint.pth", "checkpoint.prev.pth", "model_best.pth"
TEMPORARY = ".tmp"
KEYS = {"step", "model", "optimizer", "args", "sessions", "seconds", "evaluations", "labeled", "validation", "labels_sha256",
        "class_names", "mean", "std", "image_size", "rng", "cuda_rng"}


class CheckpointError(UsageError):
    """A checkpoint that is missing, damaged or not one of this program; the message names it."""


def save(state, folder):
    """Replaces the last checkpoint of a run folder by `state`, a dict of tensors and plain types."""
    path, temporary = Path(folder, NAME), Path(folder, NAME + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if path.exists():
        link(path, Path(folder, PREVIOUS))
    os.replace(temporary, path)
    sync(folder)


def save_best(folder):
    """Makes the last checkpoint the best one too."""
    link(Path(folder, NAME), Path(folder, BEST))
    sync(folder)


def link(source, target):
    """Points target at the content of source, in one step for a reader."""
    temporary = target.with_name(target.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:                     # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def sync(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path):
    """The dict in a checkpoint file, on the CPU.

    Raises CheckpointError if the file is missing, damaged, or holds more than tensors and plain types.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint (a missing file never means a fresh start)")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:          # whatever a damaged archive makes the readers raise
        reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} is not a checkpoint that can be read safely ({reason})") from None
    if not isinstance(state, dict) or not KEYS <= state.keys():
        raise CheckpointError(f"{path} is not a checkpoint of train_meta.py")
    return state


def load_last(folder, warn):
    """The newest readable checkpoint of a run folder, or None if it has none.

    A damaged last checkpoint falls back to the one before, with a line to `warn`; if both are, CheckpointError.
    """
    paths = [path for path in (Path(folder, NAME), Path(folder, PREVIOUS)) if path.exists()]
    for i, path in enumerate(paths):
        try:
            return load(path)
        except CheckpointError as error:
            if i + 1 == len(paths):
                raise
            warn(f"{error}; falling back to {paths[i + 1].name}")
    return None
