"""What a user may be told: the types of errors that are expected, and the one line and exit code that each ends a script with.

DataError comes from datasets, NetworkError from models.  Nothing here loads torch.
"""
import re
import sys
from contextlib import contextmanager

from datasets import DataError
from models import NetworkError

NO_MEMORY = ("out of memory", "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate")
OPTIONAL = {"joblib": "joblib", "matplotlib": "matplotlib", "openTSNE": "openTSNE", "scipy": "scipy", "sklearn": "scikit-learn",
            "threadpoolctl": "threadpoolctl"}       # module -> package, of those that only some commands need


class UsageError(ValueError):
    """Something on the command line, or in a file that it names, cannot be used: exit code 2."""


class Diverged(ArithmeticError):
    """Training, or the network in evaluation mode, left the finite numbers."""


class NetworkFailure(RuntimeError):
    """A network of the user's own raised an error in use; the message says where, and in which step."""


class ImagesLost(RuntimeError):
    """Images that were there when a run began, or the processes that decode them, are gone."""


class WorldError(RuntimeError):
    """The processes of a run cannot go on together."""


def printable(text):
    """Returns text that came from a file, such as a name, as a terminal or a log may show it.

    What is not printable, a line break or an escape sequence for example, becomes what Python would write for it.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(message):
    """Returns a message without line breaks and control characters."""
    return printable(" ".join(str(message).split()))


def first_line(error):
    """Returns what an error says, in at most 100 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else type(error).__name__


def fail(prog, message, code):
    """Prints one line on standard error and raises SystemExit."""
    print(f"{prog}: {one_line(message)}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def one_line_errors(prog, fail=fail, less_memory="", describe_rest=None):
    """Ends a script with one line for every expected error inside; any other error is a fault of this program.

    The exit code is 2 for what the user gave, 1 for what happened, and 130 for Ctrl-C.

    Args:
        prog, fail: the name of the script, and a function as `fail` above.
        less_memory: what to say where memory runs out, such as which flag to lower.
        describe_rest: a function without arguments that says what is left of a run that failed in its course, or None.
    """
    try:
        yield
    except NetworkError as error:
        fail(prog, f"argument --arch: {error}", 2)
    except (DataError, UsageError) as error:
        fail(prog, error, 2)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        fail(prog, f"{error.name} is missing: pip install {OPTIONAL[error.name]}", 2)
    except KeyboardInterrupt:
        fail(prog, "interrupted", 130)
    except (ArithmeticError, MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            error = f"out of memory{less_memory}"
        elif line := missing_formula(error):
            error = line
        elif not isinstance(error, (Diverged, ImagesLost, NetworkFailure, OSError, WorldError)):
            raise
        fail(prog, f"{error}; {describe_rest()}" if describe_rest else error, 1)


def is_out_of_memory(error):
    """Returns whether an exception says that the device or the machine has no memory left."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY))


def missing_formula(error):
    """Returns one line about an operation that a device cannot compute or differentiate, if an error speaks of one, or None."""
    said = str(error)
    if found := re.search(r"forward AD with (\S+) that does not support it", said):
        return (f"the operation {found[1]} has no forward-mode derivative on this device: take --meta-gradient "
                "finite-difference, which needs none, or --device cpu")
    if found := (re.search(r"operator '(?:aten::)?([^']+)' is not currently \w+ (?:for|on) the (\w+)", said)
                 or re.search(r"Could not run '(?:aten::)?([^']+)' with arguments from the '(\w+)' backend", said)):
        return (f"the operation {found[1]} does not exist on {found[2]}: where it belongs to the derivative alone, "
                "--meta-gradient finite-difference does without it; else take --device cpu")
    return None
