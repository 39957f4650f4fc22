"""A network of the user's own that fails while it is used: one line instead of a traceback through this program."""
from contextlib import contextmanager

from datasets import DataError
from models.own import NetworkError, is_own, place_in, where
from utils.cli import UsageError
from utils.device import is_out_of_memory
from utils.distributed import WorldError
from utils.metrics import Diverged


class NetworkFailure(RuntimeError):
    """What a network of the user's own raised: one line with where, and in which step."""


@contextmanager
def own_network(name, step=None):
    """Inside, what the network `name` raises becomes a NetworkFailure; errors of the data, the memory, the other processes or
    a network of this repository stay what they are, and so do logits that are not finite."""
    try:
        yield
    except Exception as error:
        others = isinstance(error, (DataError, Diverged, NetworkError, UsageError, WorldError)) or is_out_of_memory(error)
        if not is_own(name) or others or isinstance(error, OSError) and not place_in(error, name):
            raise
        at = "" if step is None else f" at step {step}"
        raise NetworkFailure(f"{name} fails{at}: {where(error, name)}") from error
