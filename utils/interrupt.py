"""Signals that end a run at the next safe point."""
import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
REPEATED = (signal.SIGHUP, signal.SIGXCPU)      # a closed terminal sends the first twice, the kernel the second every second


class Stopped(BaseException):
    """A signal came when there was nothing to save yet.  Not an Exception, so that nobody catches it by the way."""


class Interrupt:
    """Within the block the first of SIGNALS raises Stopped, or after `defer()` only sets `received`; another one ends the
    process at once, unless it is one of REPEATED.
    """

    received, deferred = None, False
    elsewhere = None        # a signal or a fault in another process, for which this one must stop, too

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.handle) for number in heard()}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def defer(self):
        """From here on there is something to save."""
        self.deferred = True

    def handle(self, number, frame):
        if self.received is not None:
            if number in REPEATED:
                return
            os._exit(self.exit_code)
        self.received = number
        if not self.deferred:
            raise Stopped

    def __call__(self):
        return self.received is not None or self.elsewhere is not None

    @property
    def exit_code(self):
        return exit_code(self.received)


def exit_code(number):
    """What a scheduler expects after a signal: 130 for SIGINT, else 143."""
    return 130 if number == signal.SIGINT else 143


def heard():
    """SIGNALS, without a SIGHUP that is ignored, as under nohup."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]


def end_at_once(prog):
    """From here on SIGINT ends a script with one line, as long as nothing else takes it over."""
    def handle(number, frame):
        os.write(2, f"{prog}: interrupted\n".encode())
        os._exit(exit_code(number))

    signal.signal(signal.SIGINT, handle)
