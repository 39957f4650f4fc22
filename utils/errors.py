"""What a user may be told: the types of errors that are expected, and the one line and exit code that each ends a script with.

DataError comes from datasets, NetworkError from models.  Nothing here loads torch.
"""
import re
import sys
from contextlib import contextmanager

from datasets import DataError
from models import NetworkError

NO_MEMORY = ("out of memory", "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "can't allocate")
LACKS = re.compile(r"(?:forward AD with |operator '|Could not run ')(?:aten::)?([^\s']+)"
                   r"'? (?:that does not support it|is not currently|with arguments)")      # torch, of what a device cannot do


class UsageError(ValueError):
    """Something on the command line, or in a file that it names, cannot be used: exit code 2."""


class Diverged(ArithmeticError):
    """Training, or the network in evaluation mode, left the finite numbers."""


class RunFailure(RuntimeError):
    """A run lost what it needs: a network of the user's own raised an error, or images or another process are gone."""


def printable(text):
    """Returns text that came from a file, such as a name, as a terminal or a log may show it.

    What is not printable, a line break or an escape sequence for example, becomes what Python would write for it.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def first_line(error):
    """Returns what an error says, in at most 100 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def fail(prog, message, code):
    """Prints one line on standard error and raises SystemExit."""
    print(f"{prog}: {printable(' '.join(str(message).split()))}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def one_line_errors(prog, fail=fail, less_memory="", describe_rest=None):
    """Ends a script with one line for every expected error inside; any other error is a fault of this program.

    The exit code is 2 for what the user gave, 1 for what happened, and for a signal that of `Stopped`, else 130.

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
        fail(prog, f"{error.name} is missing: pip install -r requirements.txt", 2)
    except KeyboardInterrupt as signal:
        fail(prog, "interrupted", *(signal.args or [130]))
    except (ArithmeticError, MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            error = f"out of memory{less_memory}"
        elif found := LACKS.search(str(error)):
            error = (f"the operation {found[1]}, or its forward-mode derivative, does not exist on this device: take "
                     "--meta-gradient finite-difference, which needs no such derivative, or --device cpu")
        elif not isinstance(error, (Diverged, OSError, RunFailure)):
            raise
        fail(prog, f"{error}; {describe_rest()}" if describe_rest else error, 1)


def is_out_of_memory(error):
    """Returns whether an exception says that the device or the machine has no memory left."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY))
