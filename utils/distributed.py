"""What the processes of one run, started by torchrun, do together.  With one process every method returns its input.

Rank 0 alone reads and writes the run folder; all others only train.  Tensors of the model travel by the backend of their
device; flags, counts and messages over gloo, where no device has to be waited for.  gloo notices at once when the other end of
a connection dies, and flags travel at every step: so no process waits for one that is gone.  A process that fails says why and
exits; torchrun ends the others.
"""
import hashlib
import os
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

from utils.errors import RunFailure, UsageError, fail, first_line

TIMEOUT = timedelta(minutes=10)         # for a process that neither answers nor dies
LOADING = timedelta(days=1)             # for the first process of a machine, which may download


class Stop(NamedTuple):
    """Why all processes of a run stop after the same step."""

    signal: int | None                  # the number of a signal, or None
    fault: str | None                   # what keeps a process from reading its next batch, or None


def processes():
    """Returns (rank, local rank, size), which of how many processes of one run this is, as the environment says; (0, 0, 1)
    without torchrun.  Raises UsageError for an environment that is neither."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 0, 0, 1
    with suppress(KeyError, ValueError):
        rank, count, _ = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        if 0 <= rank < count and os.environ["MASTER_ADDR"]:
            return rank, int(os.environ.get("LOCAL_RANK", 0)), count
    raise UsageError(f"WORLD_SIZE={size[:20]!r} in the environment is not as torchrun sets it, with RANK, MASTER_ADDR and "
                     "MASTER_PORT: start with torchrun, or unset it")


class World:
    """The processes of a run, from torchrun's environment, this one by its rank; `join` connects them."""

    def __init__(self):
        self.rank, self.local_rank, self.size = processes()
        self.dist = self.control = None

    def join(self, device):
        """Connects the processes; device: a torch.device, that of this one."""
        if self.size == 1:
            return
        import torch.distributed

        self.dist = torch.distributed
        backend = self.dist.Backend.default_device_backend_map.get(device.type, "gloo")
        with connection_failures():
            store = next(iter(self.dist.rendezvous("env://", timeout=TIMEOUT)))[0]
            # torchrun may keep one store over its restarts, and with it what the processes before have left there.
            store = self.dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            self.dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=TIMEOUT,
                                         device_id=None if backend == "gloo" else device)
            self.control = self.dist.group.WORLD
            if backend != "gloo":
                self.control = self.dist.new_group(backend="gloo", timeout=TIMEOUT)
            self.dist.barrier(self.control)

    def leave(self):
        """Waits until every process has come here, then disconnects."""
        if self.size > 1:
            with connection_failures():
                self.dist.barrier(self.control)
            self.dist.destroy_process_group()

    def fail(self, prog, message, code):
        """Ends this process as `errors.fail` does, without waiting for another on its way out."""
        try:
            fail(prog, message, code)
        finally:
            if self.size > 1:
                os._exit(code)

    def agree_to_stop(self, signal, fault=None):
        """Returns a Stop if some process got a signal or has a fault, else None; the same in every process.

        signal: its number, or None.  fault: an exception, or None.
        """
        if not any(self.all_reduce_numbers([bool(signal or fault)])):           # at every step: one number, no text
            return None
        signals, faults = zip(*self.all_gather_object((signal, fault and str(fault))))
        return Stop(max(filter(None, signals), default=None), next(filter(None, faults), None))

    def broadcast_object(self, value):
        """Returns the value that rank 0 gave, in every process: tensors and plain types."""
        if self.size == 1:
            return value
        box = [value]
        with connection_failures():
            self.dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def all_gather_object(self, value):
        """Returns the values of all processes, a list by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with connection_failures():
            self.dist.all_gather_object(values, value, group=self.control)
        return values

    def all_reduce_numbers(self, numbers):
        """Returns the sums of numbers over the processes, a list."""
        import torch

        values = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            with connection_failures():
                self.dist.all_reduce(values, group=self.control)
        return values.tolist()

    @contextmanager
    def local_first(self):
        """Lets the process of local rank 0 through the block before the others of its machine enter it."""
        if self.local_rank == 0:
            yield
        if self.size > 1:
            with connection_failures():
                self.dist.monitored_barrier(self.control, timeout=LOADING)
        if self.local_rank:
            yield

    def all_reduce_mean(self, tensors):
        """Returns the means of tensors over the processes, a list of new tensors."""
        if self.size > 1:
            tensors = [tensor.detach().clone() for tensor in tensors]
            self.together(tensors, lambda flat: self.dist.all_reduce(flat.div_(self.size)))
        return tensors

    def broadcast(self, tensors):
        """Puts what rank 0 has into tensors, in place."""
        if self.size > 1:
            self.together(tensors, lambda flat: self.dist.broadcast(flat, src=0))

    def together(self, tensors, call):
        """Makes a collective call on tensors, in place; those of one type travel as one tensor."""
        import torch

        with torch.no_grad():
            for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
                alike = [tensor for tensor in tensors if tensor.dtype == dtype]
                flat = torch.cat([tensor.reshape(-1) for tensor in alike])
                with connection_failures():
                    call(flat)
                for tensor, values in zip(alike, flat.split([tensor.numel() for tensor in alike])):
                    tensor.copy_(values.view_as(tensor))

    def check_replicas(self, state, step):
        """Raises RunFailure unless name -> tensor is the same in every process, bit for bit."""
        if self.size == 1:
            return
        import torch

        sums = [hashlib.sha256(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy()).hexdigest()
                for tensor in state.values()]
        different = [name for name, *found in zip(state, *self.all_gather_object(sums)) if len(set(found)) > 1]
        if different:
            raise RunFailure(f"the {self.size} processes are not equal any more at step {step}: {len(different)} of "
                             f"{len(state)} tensors differ, {different[0]} the first of them")

    def rows(self, batch_size):
        """Returns which rows of every batch this process takes, a slice; batch_size: a multiple of `size`."""
        count = batch_size // self.size
        return slice(self.rank * count, (self.rank + 1) * count)

    def shard(self, sequence):
        """Returns every size-th entry, from that of the rank on: the shards of all processes are the sequence."""
        return sequence[self.rank::self.size]


@contextmanager
def connection_failures():
    """Makes a RunFailure of whatever goes wrong between processes."""
    try:
        yield
    except RuntimeError as error:
        said = first_line(error).split("] ")[-1]        # without a place in the source of gloo
        raise RunFailure(f"another process of this run is gone or does not answer ({said})") from None
