"""A network in a file of the user's own, which the command line names as FILE.py:CLASS.

The file is executed: that is what it is named for.  Only a command line may name it.  What a checkpoint says about its
network is compared with the command line and never executed.  Importing this module does not load torch.
"""
import ast
import hashlib
import runpy
import traceback
from pathlib import Path
from types import SimpleNamespace

MODULE = "own_network"      # what such a file is run as


class NetworkError(ValueError):
    """A network that cannot be built or trained: one line with what, why and the remedy."""


def is_own(name):
    return ":" in name


def check_network(name):
    """SHA-256 of the file of a network FILE.py:CLASS; None for a network of this repository.  Executes nothing.

    Raises NetworkError if there is no such file, it is not Python, or it defines no such class or function.
    """
    if not is_own(name):
        return None
    path, _, wanted = name.rpartition(":")
    try:
        source = Path(path).read_bytes()
        tree = ast.parse(source)
    except OSError as error:
        raise NetworkError(f"argument --arch: {path} cannot be read ({error.strerror or error})") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NetworkError(f"argument --arch: {path} is not Python ({error})") from None
    defined = [node.name for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    if wanted not in defined:
        raise NetworkError(f"argument --arch: {path} defines no class {wanted}: write one whose call {wanted}(num_classes) "
                           "returns a torch.nn.Module")
    return hashlib.sha256(source).hexdigest()


def build_own(name, num_classes):
    """CLASS(num_classes) of FILE.py:CLASS.  Raises NetworkError for any error in there, and if it cannot be trained."""
    from torch import nn
    from torch.nn.parameter import is_lazy

    path, _, wanted = name.rpartition(":")
    try:
        # Not by an importer: it would leave a __pycache__, or run one that is older than the file.
        model = getattr(SimpleNamespace(**runpy.run_path(path, run_name=MODULE)), wanted)(num_classes)
    except (Exception, SystemExit) as error:
        raise NetworkError(f"argument --arch: {name} cannot be built: {where(error, path)}") from None
    if not isinstance(model, nn.Module):
        raise NetworkError(f"argument --arch: {name} made a {type(model).__name__}: expected a torch.nn.Module")
    if any(map(is_lazy, model.parameters())):
        raise NetworkError(f"argument --arch: {name} has lazy layers, which are not built yet: give their sizes")
    if not any(w.requires_grad for w in model.parameters()):
        raise NetworkError(f"argument --arch: {name} has no parameter that can be trained")
    return model


def rehearse(name, num_classes, image_size, device, dtype=None, meta_gradient=None):
    """Tries a network of the user's own on four random images, so that it fails before anything is written.

    The rehearsal has an instance of its own and leaves torch's random state as it was.

    Args:
        name: FILE.py:CLASS; a network of this repository needs no rehearsal, and gets none.
        num_classes, image_size: K >= 2 and H = W of the images in pixels.
        device, dtype: where it is to run, and the type for autocast or None.
        meta_gradient: None, or a function of (model, x_l, y_l, x_u) that is to work as well.

    Raises:
        NetworkError: if forward(x) does not give logits (B, K) in both modes, or meta_gradient fails.
    """
    import torch

    if not is_own(name):
        return
    path = name.rpartition(":")[0]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = build_own(name, num_classes).to(device)
        x = torch.randn(4, 3, image_size, image_size, device=device)
        y = torch.arange(4, device=device) % num_classes
        for training in (False, True):
            mode = f"in {'training' if training else 'evaluation'} mode"
            try:
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    logits = model.train(training)(x)
            except Exception as error:
                raise NetworkError(f"argument --arch: {name} fails {mode} on images {tuple(x.shape)}: "
                                   f"{where(error, path)}") from None
            if not isinstance(logits, torch.Tensor) or logits.shape != (4, num_classes) or not logits.is_floating_point():
                got = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
                raise NetworkError(f"argument --arch: {name} gives {got} {mode} for 4 images: expected logits of shape "
                                   f"(4, {num_classes})")
        if not logits.requires_grad:
            raise NetworkError(f"argument --arch: the logits of {name} depend on no parameter that can be trained")
        if meta_gradient is not None:
            try:
                meta_gradient(model, x, y, x)
            except Exception as error:
                raise NetworkError(f"argument --arch: the meta-gradient of {name} fails ({where(error, path)}): take "
                                   "--meta-gradient finite-difference, which needs no forward-mode differentiation"
                                   + (", or --precision float32" if dtype else "")) from None


def where(error, path):
    """An error in the user's file in one line: where in it, type, and the first line of what it says."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    said = str(error).strip().splitlines()
    return (f"{path}, line {lines[-1]}: " if lines else "") + type(error).__name__ + (f": {said[0][:160]}" if said else "")
