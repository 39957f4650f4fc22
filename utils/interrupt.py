"""Signals that end a run at the next safe point."""
import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(BaseException):
    """A signal came when there was nothing to save yet.  Not an Exception, so that nobody catches it by the way."""


class Interrupt:
    """Within the block the first SIGTERM, SIGINT or SIGUSR1 raises Stopped, or after `defer()` only sets `received`;
    the second one ends the process at once.
    """

    received, deferred = None, False

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def defer(self):
        """From here on there is something to save."""
        self.deferred = True

    def handle(self, number, frame):
        if self.received is not None:
            os._exit(self.exit_code)
        self.received = number
        if not self.deferred:
            raise Stopped

    def __call__(self):
        return self.received is not None

    @property
    def exit_code(self):
        return exit_code(self.received)


def exit_code(number):
    """What a scheduler expects after a signal: 130 for SIGINT, else 143."""
    return 130 if number == signal.SIGINT else 143
