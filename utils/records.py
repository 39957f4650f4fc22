"""Reads back what runs have left, and checks it: args.json, results.json, metrics.jsonl and lists of labeled images.

Every function raises UsageError, which names the file, for one that is missing, damaged or not what a run writes.
"""
import hashlib
import json
import math
import os
import re

from utils.cli import UsageError
from utils.files import ARGS, METRICS, RESULTS, SPLIT

SESSION = {"device": str, "threads": int, "precision": str, "torch": str, "commit": (str, type(None))}
FLAGS = {"dataset": str, "arch": str, "num_label": int, "seed": int, "mix_up": bool, "no_meta": bool, "data_path": str}


def read_flags(folder):
    """The resolved flags of a run, from its args.json."""
    path = folder / ARGS
    flags = fields(path, parsed(path, read(path)), {"args": dict})["args"]
    return fields(path, flags, FLAGS)


def read_split_sums(folder):
    """split.json: the sums of a run's labeled images, "sha256", and of the labels of its data, "labels_sha256"."""
    path = folder / SPLIT
    return fields(path, parsed(path, read(path)), {"sha256": str, "labels_sha256": str})


def read_results(folder):
    """results.json of a finished run."""
    path = folder / RESULTS
    results = fields(path, parsed(path, read(path)), {"error_rate": dict, "steps": int, "seconds": (int, float), "args": dict,
                                                      "sessions": list, "labeled_error_rate": (float, type(None))})
    fields(path, results["error_rate"], dict.fromkeys(("last", "median_last_20", "best_test"), float)
           | {"best_validation": (float, type(None))})
    fields(path, results["sessions"][-1] if results["sessions"] else None, SESSION)
    return results


def read_metrics(folder):
    """The records of metrics.jsonl, dicts of numbers with a "step"; without a last line that was not written to its end."""
    path = folder / METRICS
    records = [parsed(path, line) for line in read(path).split("\n")[:-1]]
    for record in records:
        fields(path, record, dict.fromkeys(record if isinstance(record, dict) else (), (int, float)) | {"step": int})
    return records


def read_split(path, names=False):
    """The indices in a label_indices.txt, a list of ints; checked against the split.json beside it, if there is one.

    names: whether it may be a list of file names instead, a list of str: "class/file", with or without a number behind it.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file: give a file of indices, one a line")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from None
    entries = text.split()
    odd = next((word for word in entries if not (word.isascii() and word.isdigit() and len(word) < 16)), None)
    if odd is None:
        entries = [int(word) for word in entries]
    elif names and "/" in text:
        # The number that published lists have behind a name is that of its class, which the folder says, too.
        entries = [os.path.normpath(re.sub(r"\s+\d+$", "", line.strip())) for line in text.splitlines() if line.strip()]
    else:
        raise UsageError(f"{path}: {odd[:40]!r} is not the index of an image" + " nor class/file" * names)
    if len(set(entries)) < len(entries):
        raise UsageError(f"{path} names an image twice")
    split = path.with_name(SPLIT)
    if split.exists():
        try:
            expected = json.loads(split.read_text(encoding="utf-8"))["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(f"{split} is damaged: restore it or remove it") from None
        if expected != hashlib.sha256(text.encode()).hexdigest():
            raise UsageError(f"{path} is not the split whose SHA-256 is in {split.name}: restore it")
    return entries


def read_given_split(path, num_label=None):
    """The indices of --split, ascending, a list of ints, or the names of files, of str; num_label: how many, if not None."""
    try:
        indices = sorted(read_split(path, names=True))
    except UsageError as error:
        raise UsageError(f"argument --split: {error}") from None
    if not indices:
        raise UsageError(f"argument --split: {path} names no image: write one a line")
    if num_label not in (None, len(indices)):
        raise UsageError(f"argument --num-label: {num_label}, but --split {path} has {len(indices)} lines: leave the flag out")
    return indices


def differing(now, then):
    """Names of what is different in two mappings, of what both hold."""
    return [name for name, value in now.items() if then.get(name, value) != value]


def read(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): it is not the file of a run") from None


def parsed(path, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is damaged: {text[:40]!r} is not JSON: restore it, or remove the run") from None


def fields(path, value, types):
    """The value itself, if it is a dict with these keys, of these types and finite."""
    if not isinstance(value, dict):
        raise UsageError(f"{path} is damaged: {str(value)[:40]!r} is no JSON object: restore it, or remove the run")
    for key, kind in types.items():
        found = value.get(key)
        if not isinstance(found, kind) or kind is int and found < 0 or isinstance(found, float) and not math.isfinite(found):
            raise UsageError(f"{path} is damaged: its {key} is {str(found)[:40]!r}: restore it, or remove the run")
    return value
