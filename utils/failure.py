"""What a user sees of an error: one line and an exit code, not a traceback through this program."""
from contextlib import contextmanager

from datasets import DataError
from models import NetworkError, is_custom
from models.custom import place_in, where
from utils.cli import UsageError
from utils.distributed import WorldError


class Diverged(ArithmeticError):
    """Training, or the network in evaluation mode, left the finite numbers."""


class NetworkFailure(RuntimeError):
    """What a custom network raised in use: one line with where, and in which step."""


@contextmanager
def network_failures(name, step=None):
    """Inside, what the custom network `name` raises becomes a NetworkFailure; errors of the data, the memory, the other
    processes or a network of this repository stay what they are, and so do logits that are not finite."""
    try:
        yield
    except Exception as error:
        others = isinstance(error, (DataError, Diverged, NetworkError, UsageError, WorldError)) or is_out_of_memory(error)
        if not is_custom(name) or others or isinstance(error, OSError) and not place_in(error, name):
            raise
        at = "" if step is None else f" at step {step}"
        raise NetworkFailure(f"{name} fails{at}: {where(error, name)}") from error


@contextmanager
def one_line_errors(prog, fail, memory="", folder=None):
    """Inside, an error that is to be expected ends the program `prog` with one line, and the exit code 2 for what the user
    gave or 1 for what happened.  Any other error is a fault of this program.

    fail: a function as `cli.fail`.
    memory: of what to take less where memory runs out.
    folder: of a run; an error that comes in its course also says what --resume can continue from.
    """
    try:
        yield
    except (DataError, NetworkError, UsageError) as error:
        fail(prog, error, 2)
    except OSError as error:
        fail(prog, error, 1)
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            error = f"out of memory{memory}"
        elif not isinstance(error, (Diverged, NetworkFailure, WorldError)):
            raise
        if folder:
            from utils.checkpoint import describe_last

            error = f"{error}; {describe_last(folder)}"
        fail(prog, error, 1)


def is_out_of_memory(error):
    """Whether an exception says that the device or the machine has no memory left."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
