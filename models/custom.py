"""A network in a file of the user's own, which the command line names as FILE.py:CLASS.

The file is executed: that is what it is named for.  Only a command line may name it.  What a checkpoint says about its
network is compared with the command line and never executed.  Importing this module does not load torch.
"""
import ast
import hashlib
import runpy
import sys
import traceback
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

# The packages of this repository are nobody's neighbors.
PACKAGES = [Path(__file__).resolve().parents[1] / name for name in ("datasets", "metasemi", "models", "reproduction", "utils")]


class NetworkError(ValueError):
    """A network that cannot be built or trained: one line with what, why and the remedy."""


def is_custom(name):
    return ":" in name


def check_network(name):
    """SHA-256 of the file of a network FILE.py:CLASS and of the neighbors that it imports; None for a network of this
    repository.  Executes nothing.

    Raises NetworkError if there is no such file, it or a neighbor is not Python, or nothing in it is named CLASS.
    """
    if not is_custom(name):
        return None
    path, _, wanted = name.rpartition(":")
    source, tree = read(path)
    named = {getattr(node, "asname", None) or getattr(node, "name", None) or getattr(node, "id", None)
             for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.alias, ast.Name))}
    if not named & {wanted, "*"}:
        raise NetworkError(f"argument --arch: {path} defines no class {wanted}: write one whose call {wanted}(num_classes) "
                           "returns a torch.nn.Module")
    digest = hashlib.sha256(source)
    for module, file in sorted(neighbors(path).items()):
        if file.is_file():
            digest.update(b"\0" + module.encode() + hashlib.sha256(read(file)[0]).digest())
    return digest.hexdigest()


def read(path):
    """A Python file's bytes and syntax tree.  Raises NetworkError."""
    try:
        source = Path(path).read_bytes()
        return source, ast.parse(source)
    except OSError as error:
        raise NetworkError(f"argument --arch: {path} cannot be read ({error.strerror or error})") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NetworkError(f"argument --arch: {path} is not Python ({error})") from None


def neighbors(path):
    """Module name -> file, for what a Python file imports from beside it, directly or through another, by the import
    statements alone; for a package without an __init__.py its folder."""
    folder, found, todo = Path(path).parent, {}, [(path, [])]
    while todo:
        importer, package = todo.pop()
        for name in imports(read(importer)[1], package):
            for i in range(1, len(name) + 1):
                module, base = ".".join(name[:i]), folder.joinpath(*name[:i])
                init, plain = base / "__init__.py", base.with_name(base.name + ".py")
                file = next(filter(Path.is_file, (init, plain)), None)
                if file and module not in found and (folder / name[0]).resolve() not in PACKAGES:
                    found[module] = file
                    todo.append((file, name[:i] if file == init else name[:i - 1]))
    for module in list(found):
        while module := module.rpartition(".")[0]:
            found.setdefault(module, folder.joinpath(*module.split(".")))
    return found


def imports(tree, package):
    """The names of all modules that a syntax tree may import, each a list of its parts; package: that of its file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            base = above + (node.module.split(".") if node.module else [])
            yield base
            yield from ([*base, alias.name] for alias in node.names)


class Uncached(SourceFileLoader):
    """Always compiles the file: leaves no __pycache__, and runs none."""

    def get_code(self, fullname):
        return self.source_to_code(self.get_data(self.path), self.path)


@contextmanager
def importable(modules):
    """Inside, modules (name -> file) come before all others of their names, such as those of this program; then not.

    They have no path on which anything else would be found.
    """
    def find_spec(name, path=None, target=None):
        file = modules.get(name)
        if file is None:
            return None
        if file.is_dir():
            return ModuleSpec(name, None, is_package=True)
        spec = ModuleSpec(name, Uncached(name, str(file)), origin=str(file), is_package=file.name == "__init__.py")
        spec.has_location = True
        return spec

    others = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    finder = SimpleNamespace(find_spec=find_spec)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def build_custom(name, num_classes):
    """CLASS(num_classes) of FILE.py:CLASS.  Raises NetworkError for any error in there, and if it cannot be trained."""
    import torch
    from torch import nn
    from torch.nn.parameter import is_lazy

    path, _, wanted = name.rpartition(":")
    modules = neighbors(path)
    try:
        with importable(modules):
            model = getattr(SimpleNamespace(**runpy.run_path(path, run_name="custom_network")), wanted)(num_classes)
    except (Exception, SystemExit) as error:
        raise NetworkError(f"argument --arch: {name} cannot be built: {where(error, name)}") from None
    if not isinstance(model, nn.Module):
        raise NetworkError(f"argument --arch: {name} made a {type(model).__name__}: expected a torch.nn.Module")
    if any(map(is_lazy, model.parameters())):
        raise NetworkError(f"argument --arch: {name} has lazy layers, which are not built yet: give their sizes")
    if not any(w.requires_grad for w in model.parameters()):
        raise NetworkError(f"argument --arch: {name} has no parameter that can be trained")
    for key, w in model.named_parameters():
        if w.is_complex() or w.layout != torch.strided:
            raise NetworkError(f"argument --arch: {name} has the {'complex' if w.is_complex() else 'sparse'} parameter {key}: "
                               "keep it as a dense real one")
    for key, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise NetworkError(f"argument --arch: {name} has the extra state {key}, a {type(value).__name__}: a checkpoint "
                               "keeps tensors alone, so make it a buffer")
    return model


def dry_run(name, num_classes, image_size, device, dtype=None, meta_gradient=None, batch=4):
    """Tries a network of the user's own on a few random images, so that it fails before anything is written.

    The trial has an instance of its own and leaves torch's random state as it was.  A network of this repository needs one
    only for a batch of one.

    Args:
        device, dtype: where it is to run, and the type for autocast or None.
        meta_gradient: None, or a function of (model, x_l, y_l, x_u) that is to work as well.
        batch: how many images, those of a step if that has fewer than four.

    Returns warnings, a list of lines.

    Raises NetworkError if forward(x) does not give logits (B, K) in both modes, changes x or cannot be differentiated, or
    meta_gradient fails.
    """
    import torch

    from models import build_model

    if not is_custom(name) and batch > 1:
        return []
    warnings = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = build_model(name, num_classes, device)
        images = torch.randn(batch, 3, image_size, image_size, device=device)
        y = torch.arange(batch, device=device) % num_classes
        for training in (False, True):
            mode = f"in {'training' if training else 'evaluation'} mode"
            x = images.clone()
            try:
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    logits = model.train(training)(x)
            except Exception as error:
                remedy = ": take a larger --batch-size" if batch == 1 and "1 value per channel" in str(error) else ""
                raise NetworkError(f"argument --arch: {name} fails {mode} on images {tuple(x.shape)}: "
                                   f"{where(error, name)}{remedy}") from None
            if not isinstance(logits, torch.Tensor) or logits.shape != (batch, num_classes) or not logits.is_floating_point():
                got = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
                raise NetworkError(f"argument --arch: {name} gives {got} {mode} for {batch} images: expected logits of shape "
                                   f"({batch}, {num_classes})")
            if not torch.equal(x, images):
                raise NetworkError(f"argument --arch: {name} changes its input {mode}, which other passes see, too: let its "
                                   "first operation not be in place")
            p = logits.detach().float()
            if not warnings and ((p >= 0) & (p <= 1)).all() and ((p.sum(dim=1) - 1).abs() < 1e-2).all():
                warnings.append(f"{name} gives probabilities {mode}, rows in [0, 1] that sum to one: the losses take logits, "
                                "so leave its softmax out")
        if not logits.requires_grad:
            raise NetworkError(f"argument --arch: the logits of {name} depend on no parameter that can be trained")
        try:
            logits.float().sum().backward()
        except Exception as error:
            raise NetworkError(f"argument --arch: {name} fails when it is differentiated: {where(error, name)}") from None
        for key, w in model.named_parameters():
            if w.grad is not None and w.grad.layout != torch.strided:
                raise NetworkError(f"argument --arch: {name} gives {key} a sparse gradient: make it dense")
        if meta_gradient is not None:
            try:
                for _ in range(2):      # the first may have left something behind
                    meta_gradient(model, images, y, images)
            except Exception as error:
                raise NetworkError(f"argument --arch: the meta-gradient of {name} fails ({where(error, name)}): take "
                                   "--meta-gradient finite-difference or unrolled, which need no forward-mode differentiation"
                                   + (", or --precision float32" if dtype else "")) from None
    return warnings


def where(error, name):
    """An error of the network FILE.py:CLASS in one line: where in its files, type, and the first line of what it says."""
    place, said = place_in(error, name), str(error).strip().splitlines()
    return (f"{place}: " if place else "") + type(error).__name__ + (f": {said[0][:160]}" if said else "")


def place_in(error, name):
    """File and line of the innermost frame of an error in the files of a network FILE.py:CLASS; None if it has none."""
    path = name.rpartition(":")[0]
    try:
        files = {path, *map(str, neighbors(path).values())}
    except NetworkError:                # changed meanwhile, or a network of this repository
        files = {path}
    return next((f"{frame.filename}, line {frame.lineno}" for frame in reversed(traceback.extract_tb(error.__traceback__))
                 if frame.filename in files), None)
