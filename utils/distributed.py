"""What the processes of one run, started by torchrun, do together.  With one process every method is a formality.

Rank 0 alone reads and writes the run folder; all others only train.  Tensors of the model travel over NCCL on CUDA and
over gloo on the CPU; flags, counts and messages over gloo, where no device has to be waited for.  gloo notices at once when
the other end of a connection dies, and flags travel at every step: so no process waits for one that is gone.  Before there
is a connection the store of torchrun carries what a process has to say: its flags, or that it has failed.
"""
import json
import os
import signal
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta

from utils.cli import UsageError, fail, one_line, processes
from utils.interrupt import heard
from utils.records import differing

TIMEOUT = timedelta(minutes=10)         # for a process that neither answers nor dies
LOADING = timedelta(days=1)             # for the first process of a machine, which may download


class WorldError(RuntimeError):
    """The processes of a run cannot go on together; one line."""


class World:
    """The processes of a run, from torchrun's environment, this one by its rank; `join` connects them, and needs torch."""

    def __init__(self):
        self.rank, self.local_rank, self.size = processes()
        self.store = self.control = self.dist = None

    def join(self, device, facts=()):
        """Connects the processes; device: of --device; facts: name -> number or text, of which they must hold the same."""
        if self.size == 1:
            return
        with dying_of_signals():        # torch would keep a signal waiting until every process has come
            import torch

            self.connect()
            cuda = device != "cpu" and torch.cuda.is_available()
            with calls():
                self.store.set(f"start {self.rank}", json.dumps({**dict(facts), "device": "cuda" if cuda else "cpu"}))
                found = [json.loads(self.store.get(f"start {rank}")) for rank in range(self.size)]
            if None in found:
                raise WorldError("another process of this run has failed")      # and has said why
            check_agreement(found)
            if cuda:
                if self.local_rank >= torch.cuda.device_count():
                    raise UsageError(f"argument --device: {torch.cuda.device_count()} CUDA devices are visible: give torchrun "
                                     "--nproc-per-node at most as many, or take --device cpu")
                torch.cuda.set_device(self.local_rank)
            with calls():
                self.dist.init_process_group("nccl" if cuda else "gloo", store=self.store, rank=self.rank, world_size=self.size,
                                             timeout=TIMEOUT)
                self.control = self.dist.new_group(backend="gloo", timeout=TIMEOUT) if cuda else self.dist.group.WORLD
                self.dist.barrier(self.control)

    def connect(self):
        """To the store of torchrun."""
        import torch.distributed

        self.dist = torch.distributed
        with calls():
            store = next(iter(self.dist.rendezvous("env://", timeout=TIMEOUT)))[0]
        # torchrun may keep one store over its restarts, and with it what the processes before have left there.
        self.store = self.dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def leave(self):
        """Waits until every process has come here, then disconnects."""
        if self.size > 1:
            with calls():
                self.dist.barrier(self.control)
            self.dist.destroy_process_group()

    # Messages

    def broadcast_object(self, value):
        """The value that rank 0 gave, in every process: tensors and plain types."""
        if self.size == 1:
            return value
        box = [value]
        with calls():
            self.dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def all_gather_object(self, value):
        """The values of all processes, a list by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with calls():
            self.dist.all_gather_object(values, value, group=self.control)
        return values

    def check_same(self, facts):
        """Raises UsageError, which names what differs, unless name -> value is the same in all processes."""
        check_agreement(self.all_gather_object(facts))

    def all_reduce_max(self, number):
        """The largest of a number over the processes, in which None counts as 0 and comes back for it."""
        return int(self.all_reduce_numbers([number or 0], "MAX")[0]) or None

    def all_reduce_numbers(self, numbers, operation="SUM"):
        """Sums of numbers over the processes, or with "MAX" the largest of them, a list."""
        if self.size == 1:
            return numbers
        import torch

        values = torch.tensor(numbers, dtype=torch.float64)
        with calls():
            self.dist.all_reduce(values, getattr(self.dist.ReduceOp, operation), group=self.control)
        return values.tolist()

    @contextmanager
    def local_first(self):
        """On every machine the process of local rank 0 is through the block before the others enter it."""
        if self.local_rank == 0:
            yield
        if self.size > 1:
            with calls():
                self.dist.monitored_barrier(self.control, timeout=LOADING)
        if self.local_rank:
            yield

    # Tensors of the model

    def all_reduce_mean(self, tensors):
        """Means of tensors over the processes, a list of new tensors."""
        if self.size == 1:
            return tensors
        return self.flattened(tensors, lambda flat: self.dist.all_reduce(flat.div_(self.size)))

    def broadcast(self, tensors):
        """Puts what rank 0 has into tensors, in place."""
        if self.size > 1:
            for tensor, first in zip(tensors, self.flattened(tensors, lambda flat: self.dist.broadcast(flat, src=0))):
                tensor.copy_(first)

    def flattened(self, tensors, call):
        """The results of a collective call on tensors, a list of new ones; those of one type travel as one tensor."""
        import torch

        with torch.no_grad():
            results = [torch.empty_like(tensor) for tensor in tensors]
            for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
                alike = [(t, result) for t, result in zip(tensors, results) if t.dtype == dtype]
                flat = torch.cat([t.reshape(-1) for t, _ in alike])
                with calls():
                    call(flat)
                for (_, result), values in zip(alike, flat.split([t.numel() for t, _ in alike])):
                    result.copy_(values.view(result.shape))
        return results

    def check_replicas(self, state, step):
        """Raises WorldError unless name -> tensor is the same in every process, bit for bit."""
        if self.size == 1:
            return
        import torch

        sums = torch.stack([checksum(tensor) for tensor in state.values()]).tolist()
        different = [name for name, *found in zip(state, *self.all_gather_object(sums)) if len(set(found)) > 1]
        if different:
            raise WorldError(f"the {self.size} processes are not equal any more at step {step}: {len(different)} of "
                             f"{len(state)} tensors differ, {different[0]} the first of them")

    # What each process does for itself

    def rows(self, batch_size):
        """Which rows of every batch this process takes, a slice; batch_size: a multiple of `size`."""
        count = batch_size // self.size
        return slice(self.rank * count, (self.rank + 1) * count)

    def shard(self, sequence):
        """Every size-th entry, from that of the rank on: the shards of all processes are the sequence."""
        return sequence[self.rank::self.size]

    # The end of a run that fails

    def fails_first(self, code):
        """Whether this process is the first to fail, and so the one that says why; code: with which it will exit."""
        if self.store is None:
            return self.rank == 0
        try:
            first = self.store.add("failures", 1) == 1
            if first:
                self.store.set("exit code", str(code))
        except RuntimeError:            # the machine that keeps the store is gone
            return True
        return first

    def fail(self, prog, message, code):
        """`cli.fail`, but one process speaks for all, and none waits for another on its way out."""
        if self.size == 1:
            fail(prog, message, code)
        if self.store is None:
            with dying_of_signals(), suppress(WorldError):
                self.connect()
        if self.fails_first(code):
            print(f"{prog}: {one_line(message)}", file=sys.stderr, flush=True)
        if self.store is not None:
            with suppress(RuntimeError):
                self.store.set(f"start {self.rank}", json.dumps(None))          # for those who still wait in `join`
                if self.store.check(["exit code"]):
                    code = int(self.store.get("exit code"))                     # of the process that failed first
        os._exit(code)


def check_agreement(facts):
    """Raises UsageError, which names what differs, unless all processes hold the same; facts: those of each, by rank."""
    for rank, own in enumerate(facts):
        names = differing(own, facts[0])
        if names:
            raise UsageError(f"process {rank} is in another experiment than process 0: "
                             + ", ".join(f"{name} {str(own[name])[:40]}, not {str(facts[0][name])[:40]}" for name in names)
                             + ": start all with the same flags, data, network and versions")


@contextmanager
def calls():
    """Whatever goes wrong between processes is a WorldError."""
    try:
        yield
    except RuntimeError as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0].split("] ")[-1]
        raise WorldError(f"another process of this run is gone or does not answer ({said[:80]})") from None


@contextmanager
def dying_of_signals():
    """Within the block a signal ends the process."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in heard()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def checksum(tensor):
    """() int64 of all bits of a tensor and of their places."""
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().reshape(-1).view(whole).long()
    return (bits * (torch.arange(len(bits), device=bits.device) % 65521 + 1)).sum()
