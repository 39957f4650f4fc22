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
FOLDERS = []            # of the networks that were executed; each is on sys.path, too


class NetworkError(ValueError):
    """A network that cannot be built or trained: one line that begins with its name, and says what is wrong and the remedy."""


class TextLoader(SourceFileLoader):
    """Loads a Python file from its text, which the digest covers; reads and leaves no __pycache__."""

    def get_code(self, fullname):
        return self.source_to_code(self.get_data(self.path), self.path)


def is_custom(name):
    """Returns whether a name is that of a network in a file, FILE.py:CLASS."""
    return ":" in name


def folder_of(name):
    """Returns the folder of the file of a network FILE.py:CLASS, with links followed."""
    return Path(name.rpartition(":")[0]).resolve().parent


def check_network(name):
    """Returns the SHA-256 of the file of a network FILE.py:CLASS, in hex; None for a network of this repository.

    Nothing is executed, and the modules that the file imports are not covered.

    Raises NetworkError if there is no such file, it is not Python or does not name CLASS, or a module beside it has the name
    of a package here, or of one that another network imported from its own folder: Python knows one module of a name.
    """
    if not is_custom(name):
        return None
    (path, _, wanted), folder = name.rpartition(":"), folder_of(name)
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
        if beside.stem in PACKAGES and beside.resolve() != ROOT / beside.stem:
            raise NetworkError(f"{name}: {beside} has the name of a package of this program: rename it")
        loaded = vars(sys.modules[beside.stem]) if sys.modules.get(beside.stem) else {}
        other = Path(next(iter(loaded.get("__path__") or [loaded.get("__file__") or ""])))
        if other.parent != folder and other.parent in FOLDERS:
            raise NetworkError(f"{name}: {beside} has the name of {other}, which another network imports: rename one of them")
    return hashlib.sha256(text).hexdigest()


def build_custom(name, num_classes):
    """Returns CLASS(num_classes) of FILE.py:CLASS, which is executed as a module under a private name.

    Its folder comes first where modules are looked for, so that it imports its neighbors.  They stay imported.
    Raises NetworkError for any error in there, and if nothing in it can be trained.
    """
    from torch import nn

    private = f"custom_network_{check_network(name)[:16]}"
    (path, _, wanted), folder = name.rpartition(":"), folder_of(name)
    if folder not in FOLDERS:
        FOLDERS.append(folder)
        sys.path.insert(0, str(folder))
    loader = TextLoader(private, path)
    module = sys.modules[private] = module_from_spec(spec_from_loader(private, loader))     # dataclasses look for it there
    try:
        loader.exec_module(module)
        model = getattr(module, wanted)(num_classes)
    except (Exception, SystemExit) as error:
        if isinstance(error, NetworkError):     # of another network, which this one builds
            raise
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
    """Returns file and line of the innermost frame of an error in the file of a network FILE.py:CLASS or one beside it; None
    if there is none."""
    path, folder = name.rpartition(":")[0], folder_of(name)
    return next((f"{frame.filename}, line {frame.lineno}" for frame in reversed(traceback.extract_tb(error.__traceback__))
                 if frame.filename == path or Path(frame.filename).resolve().parent == folder != ROOT), None)
