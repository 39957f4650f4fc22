"""Signals that end a run at the next safe point."""
import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupt:
    """Within the block, the first SIGTERM, SIGINT or SIGUSR1 only sets `received`; a second one exits at once."""

    received = None

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.received is not None:
            os._exit(self.exit_code)
        self.received = number

    def __call__(self):
        return self.received is not None

    @property
    def exit_code(self):
        """What a scheduler expects: 130 for SIGINT, else 143."""
        return 130 if self.received == signal.SIGINT else 143
