"""Signals that end a run at the next safe point."""
import os
import signal
from contextlib import ExitStack

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
REPEATED = (signal.SIGHUP, signal.SIGXCPU)      # a closed terminal sends the first twice, the kernel the second every second


class Stopped(KeyboardInterrupt):
    """A signal came when there was nothing to save yet; the argument is the exit code."""


class Interrupt(ExitStack):
    """Within the block, after `listen()`, the first of SIGNALS raises Stopped, or only sets `received` once `deferred` is true;
    another one ends the process at once, unless it is one of REPEATED.
    """

    received, deferred = None, False

    def listen(self):
        """Takes the signals over until the end of the block; after one has come, until the end of the program."""
        for number in SIGNALS:
            # A SIGHUP that is ignored, as under nohup, stays so.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                previous = signal.signal(number, self.handle)
                self.callback(lambda *given: self.received or signal.signal(*given), number, previous)

    def handle(self, number, frame):
        if self.received is not None:
            if number in REPEATED:
                return
            os._exit(exit_code(self.received))
        self.received = number
        if not self.deferred:
            raise Stopped(exit_code(number))

    def __call__(self):
        return self.received is not None


def exit_code(number):
    """Returns the exit code that a scheduler expects after a signal: 130 for SIGINT, else 143."""
    return 130 if number == signal.SIGINT else 143
