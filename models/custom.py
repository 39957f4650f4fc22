"""A network in a file of the user's own, which the command line names as FILE.py:CLASS.

The file is executed: that is what it is named for.  Only a command line may name it.  What a checkpoint says about its
network is compared with the command line and never executed.  Importing this module does not load torch.
"""
import hashlib
import sys
import traceback
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("datasets", "metasemi", "models", "reproduction", "utils")


class NetworkError(ValueError):
    """A network that cannot be built or trained: one line that begins with its name, and says what is wrong and the remedy."""


def is_custom(name):
    """Returns whether a name is that of a network in a file, FILE.py:CLASS."""
    return ":" in name


def parse(name):
    """Returns FILE, its folder with links followed, and CLASS of a name FILE.py:CLASS."""
    path, _, wanted = name.rpartition(":")
    return path, Path(path).resolve().parent, wanted


def check_network(name):
    """Returns the SHA-256 of the file of a network FILE.py:CLASS, in hex; None for a network of this repository.

    Nothing is executed, and the modules that the file imports are not covered.

    Raises NetworkError if there is no such file, it is not Python or does not name CLASS, or a module beside it has the name
    of a package here, or of a module that was imported from elsewhere: Python knows one module of a name.
    """
    if not is_custom(name):
        return None
    path, folder, wanted = parse(name)
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError(None, "not a regular file")
        text = Path(path).read_bytes()
        compile(text, path, "exec")
    except OSError as error:
        raise NetworkError(f"{name}: its file cannot be read ({error.strerror or error})") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NetworkError(f"{name}: its file is not Python ({error})") from None
    if not wanted.isidentifier() or wanted.encode() not in text and b"import *" not in text:
        raise NetworkError(f"{name}: its file defines no class {wanted}: write one whose call {wanted}(num_classes) returns a "
                           "torch.nn.Module")
    for beside in sorted({*folder.glob("*.py"), *(file.parent for file in folder.glob("*/*.py"))}):
        other = ROOT / beside.stem if beside.stem in PACKAGES else place_of(beside.stem)
        if other and other.parent.resolve() != folder and beside.stem != "__main__":
            raise NetworkError(f"{name}: {beside} has the name of the module {other}: rename it")
    return hashlib.sha256(text).hexdigest()


def place_of(module):
    """Returns the file or folder that a module of this name was imported from, or None."""
    found = vars(sys.modules.get(module) or object)
    place = next(iter(found.get("__path__") or [found.get("__file__")]))
    return place and Path(place)


def build_custom(name, num_classes):
    """Returns CLASS(num_classes) of FILE.py:CLASS, which is executed as a module under a private name.

    Its folder is put on the import path, so that it imports its neighbors.  They stay imported.
    Raises NetworkError for any error in there, and if nothing in it can be trained.
    """
    from torch import nn

    private = f"custom_network_{check_network(name)[:16]}"
    path, folder, wanted = parse(name)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    loader = SourceFileLoader(private, path)
    loader.get_code = lambda _: loader.source_to_code(loader.get_data(path), path)      # the text: a __pycache__ may be old
    module = sys.modules[private] = module_from_spec(spec_from_loader(private, loader))     # dataclasses look for it there
    try:
        loader.exec_module(module)
        model = getattr(module, wanted)(num_classes)
    except NetworkError:            # of another network, which this one builds
        raise
    except (Exception, SystemExit) as error:
        raise NetworkError(f"{name} cannot be built: {where(error, name)}") from None
    if not isinstance(model, nn.Module):
        raise NetworkError(f"{name} made a {type(model).__name__}: expected a torch.nn.Module")
    if any(map(nn.parameter.is_lazy, model.parameters())):
        raise NetworkError(f"{name} has lazy layers, which are not built yet: give their sizes")
    if not any(w.requires_grad for w in model.parameters()):
        raise NetworkError(f"{name} has no parameter that can be trained")
    return model


def where(error, name):
    """Returns an error of the network FILE.py:CLASS as one line: where in its files, type, and the first line of its text."""
    place, said = place_in(error, name), str(error).strip().splitlines()
    return (f"{place}: " if place else "") + type(error).__name__ + (f": {said[0][:160]}" if said else "")


def place_in(error, name):
    """Returns file and line of the innermost frame of an error in the file of a network or one beside it, or None."""
    path, folder, _ = parse(name)
    return next((f"{frame.filename}, line {frame.lineno}" for frame in reversed(traceback.extract_tb(error.__traceback__))
                 if frame.filename == path or Path(frame.filename).resolve().parent == folder != ROOT), None)
