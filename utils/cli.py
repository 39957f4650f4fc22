"""Command lines: types that say which value was given, which rule it breaks and what to do; one line, exit code 2.

No value is evaluated, no flag may be abbreviated, and nothing here loads torch: a wrong flag answers at once.
"""
import argparse
import io
import math
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from utils.files import printable

MOST = 10 ** 12                         # the bound of whole numbers without one of their own: all of them are exact as floats
LONGEST_NAME, LONGEST_PATH = 255, 3840  # bytes; Linux takes 255 and 4,095, and files with names of their own come below


class UsageError(ValueError):
    """Something given cannot be used as it is: one line with what, why and the remedy; the program exits with code 2."""


def one_line(message):
    return printable(" ".join(str(message).split()))


def first_line(error):
    """What an error says, in at most 100 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:100] if lines else type(error).__name__


def fail(prog, message, code):
    """One line on standard error, then out."""
    print(f"{prog}: {one_line(message)}", file=sys.stderr)
    raise SystemExit(code)


def processes():
    """(rank, local rank, size): which of how many processes of one run this is, as torchrun says in the environment; else
    (0, 0, 1).  Raises UsageError for an environment that is neither."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 0, 0, 1
    given = [os.environ.get("RANK", ""), os.environ.get("LOCAL_RANK", "0"), size, os.environ.get("MASTER_PORT", "")]
    numbers = [int(text) for text in given if re.fullmatch("[0-9]{1,9}", text)]
    if len(numbers) < 4 or numbers[0] >= numbers[2] or not os.environ.get("MASTER_ADDR"):
        raise UsageError(f"WORLD_SIZE={size[:20]!r} in the environment is not as torchrun sets it, with RANK, MASTER_ADDR and "
                         "MASTER_PORT: start with torchrun, or unset it")
    return tuple(numbers[:3])


class Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    fail = staticmethod(fail)

    def error(self, message):
        self.fail(self.prog, f"{message} (usage: {self.prog} --help)", 2)


def number(kind, low=None, high=None, above=None, below=None):
    """An argparse type: a finite number of a kind (int or float) within closed (low, high) or open bounds.

    A whole number is at most MOST unless `high` says otherwise.
    """
    if kind is int and high is None:
        high = MOST
    rule = " and ".join(f"{words} {bound:g}" for words, bound in
                        (("at least", low), ("at most", high), ("above", above), ("below", below)) if bound is not None)
    noun = "a whole number" if kind is int else "a number"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not {noun}: give one {rule}") from None
        if not ((low is None or value >= low) and (high is None or value <= high)
                and (above is None or value > above) and (below is None or value < below) and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text[:80]} is out of range: give {noun} {rule}")
        return value
    return parse


def path(text):
    """An argparse type: a path that is short enough for the system, with room for the files that are written under it."""
    if len(os.fsencode(text)) > LONGEST_PATH or any(len(os.fsencode(name)) > LONGEST_NAME for name in text.split("/")):
        raise argparse.ArgumentTypeError(f"{text[:80]!r}... is too long: give a path of at most {LONGEST_PATH} bytes, and at "
                                         f"most {LONGEST_NAME} between two slashes")
    return Path(text)


def folder(text):
    """An argparse type: a path that names a folder of its own, not the current one by a variable that is empty."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: name a folder")
    return path(text)


def parse_milestones(texts):
    """"[300000, 350000]", "300000,350000", ["300000", "350000"] or the list itself to [300000, 350000]; evaluates nothing.

    Raises ValueError unless the steps are whole, positive and ascending.
    """
    text = texts if isinstance(texts, str) else " ".join(map(str, texts))
    body = text.strip()
    if body.startswith("[") and body.endswith("]"):
        body = body[1:-1].strip()
    if not re.fullmatch(r"([0-9]{1,15}(\s*,\s*|\s+))*([0-9]{1,15})?", body, re.ASCII):
        raise ValueError(f"{text[:80]!r} is not a list of steps: write \"[300000, 350000]\" or 300000,350000")
    steps = [int(part) for part in re.findall("[0-9]+", body)]
    if any(step == 0 for step in steps) or steps != sorted(set(steps)):
        raise ValueError(f"{text[:80]!r} is not ascending from at least 1: write \"[300000, 350000]\"")
    return steps


def option(key):
    """The spelling of a flag on the command line; key: its name among the parsed arguments."""
    return f"--{key.replace('_', '-')}"


def refuse_idle(parser, args, choice, keys):
    """Exits with code 2 if flags among `keys`, which have no effect with a choice, are not at their defaults.

    A default that is spelled out is no contradiction: the official command lines spell out many.
    """
    flags = [option(key) for key in keys if getattr(args, key) not in (None, parser.get_default(key))]
    if flags:
        parser.error(f"argument {', '.join(flags)}: without effect with {choice}: leave {'them' if flags[1:] else 'it'} out")


def open_standard_streams():
    """Puts the null device where standard input, output or error was closed: else the next file would take its place.

    What the locale cannot write, such as a name in another alphabet, is escaped on standard output as on standard error.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)                              # takes the lowest free number: this one
            setattr(sys, name, os.fdopen(number, mode, closefd=False, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):             # a pipe that has taken the place of a file
            sys.stdout.reconfigure(errors="backslashreplace")
