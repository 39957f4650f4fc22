"""Reading back what runs have left: args.json, results.json and metrics.jsonl, checked before anybody believes them.

Every function raises UsageError, which names the file, for one that is missing, damaged or not what a run writes.
"""
import json
import math

from utils.cli import UsageError
from utils.run_folder import ARGS, FREE, METRICS, OLDER, RESULTS, SPLIT

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


def difference(flags, expected, free=FREE):
    """The first flag, but those that are free, in which a run is not what is expected, with both values; or None."""
    return next((f"--{key.replace('_', '-')} is {flags.get(key, OLDER.get(key))} there and {value} here"
                 for key, value in expected.items() if key not in free and flags.get(key, OLDER.get(key)) != value), None)


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
