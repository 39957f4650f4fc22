"""Command lines: types that say which value was given, which rule it breaks and what to do; one line, exit code 2.

No value is evaluated, no flag may be abbreviated, and nothing here loads torch: a wrong flag answers at once.
"""
import argparse
import math
import operator
import re
import sys
from contextlib import suppress
from pathlib import Path

from utils.errors import fail

MOST = 10 ** 12                         # default upper bound of whole numbers: all of them are exact as floats
BOUNDS = {"low": ("at least", operator.ge), "high": ("at most", operator.le), "above": ("above", operator.gt),
          "below": ("below", operator.lt)}


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and ends with one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    fail = staticmethod(fail)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        if word := next((word for word in args if re.fullmatch("(-[a-z]|--[-a-z]+=)--", word)), None):
            # argparse would make an empty list of it
            self.error(f"argument {word[:-2].rstrip('=')}: '--' is no value: give another")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.fail(self.prog, f"{message} (usage: {self.prog} --help)", 2)


def number(kind, **bounds):
    """An argparse type: a finite number of a kind (int or float) within bounds, whose names are those of BOUNDS.

    A whole number is at most MOST unless `high` says otherwise.
    """
    if kind is int:
        bounds.setdefault("high", MOST)
    rule = " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in bounds.items())

    def parse(text):
        with suppress(ValueError):
            value = kind(text)
            if all(BOUNDS[name][1](value, bound) for name, bound in bounds.items()) and math.isfinite(value):
                return value
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a {'whole ' * (kind is int)}number that is {rule}: give one")
    return parse


def path(text):
    """An argparse type: a path that is not empty, as by a variable without a value."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: name a file or folder")
    if max(map(len, text.encode(errors="surrogateescape").split(b"/"))) > 255:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} begins a name of more than 255 bytes: give a shorter one")
    return Path(text)


def parse_milestones(texts):
    """"[300000, 350000]", "300000,350000", ["300000", "350000"] or the list itself to [300000, 350000]; evaluates nothing.

    Raises ValueError unless the steps are whole, positive and ascending.
    """
    text = texts if isinstance(texts, str) else " ".join(map(str, texts))
    body = text.strip().removeprefix("[").removesuffix("]").strip()
    is_list = re.fullmatch(r"([0-9]{1,15}(\s*,\s*|\s+))*([0-9]{1,15})?", body, re.ASCII)
    steps = [int(part) for part in re.findall("[0-9]+", body)] if is_list else [0]
    if 0 in steps or steps != sorted(set(steps)):
        raise ValueError(f"{text[:80]!r} is no list of steps, ascending from 1 up: write \"[300000, 350000]\" or 300000,350000")
    return steps


def option(key):
    """Returns the spelling of a flag on the command line; key: its name among the parsed arguments."""
    return f"--{key.replace('_', '-')}"


def refuse_without_effect(parser, args, choice, keys):
    """Exits with code 2 if flags among `keys`, which have no effect with a choice, are not at their defaults.

    A default that is spelled out is no contradiction: the official command lines spell out many.
    """
    flags = [option(key) for key in keys if getattr(args, key, None) not in (None, parser.get_default(key))]
    if flags:
        parser.error(f"argument {', '.join(flags)}: without effect with {choice}: leave {'them' if flags[1:] else 'it'} out")


def escape_output():
    """Makes standard output escape what the locale cannot write, such as a name in another alphabet."""
    with suppress(AttributeError, OSError):     # no file of text, or a pipe that has taken the place of one
        sys.stdout.reconfigure(errors="backslashreplace")
