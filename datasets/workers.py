"""Processes that decode image files.

They belong to concurrent.futures, not to a torch DataLoader, although that is as fast.  A DataLoader raises the death of a
worker from a signal handler, anywhere in a training step; waits without end for a worker that is stopped, whatever signal the
run gets; and leaves its workers behind when a run is killed, with the run's lock if they were forked.  A worker that was not
forked imports torch, which takes 2.9 s of CPU time and 315 MiB, beside 0.3 s and 20 MiB here.
"""
import os
import signal
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from threading import Thread

from datasets.decoding import decode_files

POLL_SECONDS = 0.2      # between looks at whether to wait any longer
DEAD = "a process that decodes images has ended"


class Workers:
    """A pool of `count` processes, started at the first `submit`; with a count of 0 this process decodes, in `submit`.

    One pool serves training and evaluation.

    stop: once this returns true, waiting for a process that does not answer ends.
    """

    def __init__(self, count, stop=lambda: False):
        self.count, self.stop, self.pool = count, stop, None

    def submit(self, paths, image_size, crops):
        """A future of `decode_files` with these arguments.  Raises OSError if a process has died."""
        if self.count == 0:
            future = Future()
            future.set_result(decode_files(paths, image_size, crops))
            return future
        # Workers start with all signals blocked: one to the whole process group must not break the pool.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            if self.pool is None:
                self.pool = ProcessPoolExecutor(self.count, mp_context=get_context("spawn"), initializer=exit_with_parent)
                signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())    # the first pool of a process unblocks some
            return self.pool.submit(decode_files, paths, image_size, crops)
        except BrokenProcessPool as error:
            raise OSError(self.explain_death()) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    def result(self, future):
        """That of a future of `submit`.  Raises InterruptedError once `stop()`, and OSError if a process has died."""
        while True:
            try:
                return future.result(timeout=POLL_SECONDS)
            except TimeoutError:
                if self.stop():
                    raise InterruptedError("stopped while images were decoded") from None
            except BrokenProcessPool as error:
                raise OSError(self.explain_death()) from error

    def explain_death(self):
        """The message once a process has died: one that was killed has a negative exit code."""
        processes = self.processes()
        for process in processes:
            process.kill()              # they may wait for a lock that the dead one holds, and block the pool's signal
        for _ in range(500):            # the pool's own thread may be the first to learn the exit code
            if all(process.exitcode is not None for process in processes):
                break
            time.sleep(0.01)
        if any((process.exitcode or 0) > 0 for process in processes):
            return f"{DEAD} before it began: in a program of your own start the work under if __name__ == \"__main__\":"
        return f"{DEAD}, killed for its memory perhaps: lower --num-workers"

    def processes(self):
        return list(self.pool._processes.values()) if self.pool else []

    def close(self):
        """Ends the processes; the next `submit` starts new ones."""
        processes = self.processes()
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGCONT)        # a stopped one would never end


def exit_with_parent():
    """In a worker: ends it once its parent has ended, however that happened."""
    Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()
