"""The files of a run: their names, writing them so that neither a kill nor a full disk breaks them, and reading them back.

What others may have written is opened only if it is a regular file.  Reading functions raise UsageError, which names the file,
for one that is missing, damaged or not what a run writes.
"""
import csv
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
from contextlib import contextmanager, suppress

from utils.errors import UsageError

TEMPORARY = ".tmp"
ARGS, LOG, METRICS, RESULTS = "args.json", "log.txt", "metrics.jsonl", "results.json"
INDICES, SPLIT, LOCK = "label_indices.txt", "split.json", ".lock"
CHECKPOINT, PREVIOUS, BEST = "checkpoint.pth", "checkpoint.prev.pth", "model_best.pth"
RUN_FILES = (ARGS, LOG, METRICS, RESULTS, INDICES, SPLIT, CHECKPOINT, PREVIOUS, BEST)
LAST = True                 # --resume without a path: from the last checkpoint

FLAGS = {"dataset": str, "arch": str, "num_label": int, "seed": int, "mix_up": bool, "no_meta": bool, "data_path": str}
SESSION = {"device": str, "threads": int, "precision": str, "torch": str, "commit": (str, type(None))}
RATES = {"last": float, "median_last_20": float, "best_test": float, "best_validation": (float, type(None))}
FIGURES = {"error_rate": RATES, "labeled_error_rate": (float, type(None)), "steps": int, "seconds": (int, float), "args": dict,
           "sessions": list}


@contextmanager
def temporary_name(path):
    """Gives the path of a file that is made inside the block and takes the place of `path` in one step at its end.

    A kill at any moment leaves the old file or the new one; an exception, such as a full disk, leaves the old one.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        os.replace(temporary, path)
    finally:                # os.replace does nothing if both names are one file
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replacing(path, backup=None):
    """Gives a binary file to write to, which takes the place of `path` as a `temporary_name` does, and is on the disk then.

    backup: where the old file stays, if there is one.
    """
    with temporary_name(path) as temporary:
        with open(temporary, "xb") as file:     # never through a symbolic link that somebody put there
            yield file
            file.flush()
            os.fsync(file.fileno())
        if backup and path.exists():
            link(path, backup)
    sync(path.parent)


def write_text(path, text):
    """Replaces a file by a text, atomically."""
    with replacing(path) as file:
        file.write(text.encode(errors="surrogateescape"))


def csv_text(rows):
    """Returns rows of values as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_json(path, content):
    """Replaces a file by a value as JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def link(source, target):
    """Replaces target by a hard link to source, atomically."""
    with temporary_name(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:                     # a file system without hard links
            shutil.copyfile(source, temporary)


def sync(folder):
    """Makes the names in a folder durable, where the file system can."""
    with suppress(OSError):                 # CIFS and FUSE cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Appender:
    """A file that grows.  What a full disk refuses is kept in memory and written when there is room again.

    say: a function that prints a line; it tells of the first failure of several.
    """

    def __init__(self, path, say=lambda message: None):
        self.path, self.file, self.pending, self.say = path, open(path, "ab", buffering=0), b"", say
        self.error = None               # why the last attempt failed, or None

    def write(self, data):
        """data: bytes or text."""
        self.pending += data.encode(errors="backslashreplace") if isinstance(data, str) else data
        try:
            while self.pending:
                self.pending = self.pending[self.file.write(self.pending):]
            self.error = None
        except OSError as error:
            known, self.error = self.error, error
            if not known:
                self.say(f"{self.path} cannot be written ({error}): its lines are kept in memory until it can")

    def flush(self):
        self.write(b"")

    def close(self):
        self.flush()
        self.file.close()


def lock(folder, say=print):
    """Makes a folder and locks it against other processes until the file that it returns is closed, or this process ends.

    say: a function that prints a line.  Raises UsageError if another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{folder} is in use by process {file.read(20).strip() or 'unknown'}") from None
    except OSError:
        say(f"{folder}: this file system knows no locks: start no second run in there")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def read_bytes(path):
    """Returns the content of a regular file: to open a pipe would wait for ever."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a regular file: give another, or move it away")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error}): restore it, or give another") from None


def read_text(path):
    """Returns the text of a regular file in UTF-8, with or without a byte order mark."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read ({error}): restore it, or give another") from None


def check(path, value, kind, name="content"):
    """Raises UsageError unless a value from a JSON file is finite and of a kind: a type, types, or a dict key -> kind."""
    good = isinstance(value, dict if isinstance(kind, dict) else kind)
    if not good or kind is int and value < 0 or isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{path} is damaged: its {name} is {str(value)[:40]!r}: restore it, or remove the run")
    for key, inner in kind.items() if isinstance(kind, dict) else ():
        check(path, value.get(key), inner, key)


def read_json(path, kind, text=None):
    """Returns the value in a JSON file, or in a text from it, checked as by `check`."""
    text = read_text(path) if text is None else text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text                    # which is of no kind
    check(path, value, kind)
    return value


def read_flags(folder):
    """Returns the resolved flags of a run, from its args.json."""
    return read_json(folder / ARGS, {"args": FLAGS})["args"]


def read_split_sums(folder):
    """Returns split.json: the sums of a run's labeled images, "sha256", and of the labels of its data, "labels_sha256"."""
    return read_json(folder / SPLIT, {"sha256": str, "labels_sha256": str})


def read_results(folder):
    """Returns results.json of a finished run."""
    results = read_json(folder / RESULTS, FIGURES)
    check(folder / RESULTS, results["sessions"][-1] if results["sessions"] else None, SESSION, "last session")
    return results


def read_metrics(folder):
    """Returns the records of metrics.jsonl, dicts of numbers with a "step"; without a last line that is cut off."""
    path = folder / METRICS
    records = [read_json(path, {"step": int}, line) for line in read_text(path).split("\n")[:-1]]
    for record in records:
        check(path, record, dict.fromkeys(record, (int, float)))
    return records


def read_split(path):
    """Returns the indices in a label_indices.txt, a list of ints, checked against the split.json beside it, if there is one.

    In another list there may be names of files instead, a list of str: "class/file", with or without a number behind it.
    """
    text = read_text(path)
    odd = next((word for word in text.split() if not re.fullmatch("[0-9]{1,15}", word)), None)
    if odd is None:
        entries = [int(word) for word in text.split()]
    elif "/" in text:
        # The number that published lists have behind a name is that of its class, which the folder says, too.
        entries = [os.path.normpath(re.sub(r"\s+\d+$", "", line.strip())) for line in text.splitlines() if line.strip()]
    else:
        raise UsageError(f"{path}: {odd[:40]!r} is not the index of an image nor class/file")
    if len(set(entries)) < len(entries):
        raise UsageError(f"{path} names an image twice")
    if path.name == INDICES and path.with_name(SPLIT).exists():
        if read_split_sums(path.parent)["sha256"] != hashlib.sha256(text.encode()).hexdigest():
            raise UsageError(f"{path} is not the split whose SHA-256 is in {SPLIT}: restore it, or remove both files")
    return entries


def holds_run(folder):
    """Returns whether a folder has a file of a run."""
    return any((folder / name).exists() for name in RUN_FILES)


def check_paths(path, resume, overwrite):
    """Raises UsageError for a run folder that a command must not touch, or a checkpoint that is missing.

    resume: None, LAST or the path of a checkpoint.
    """
    if resume not in (None, LAST) and not resume.exists():
        raise UsageError(f"argument --resume: {resume}: no such checkpoint (a missing file never means a fresh start)")
    if path.exists() and not path.is_dir():
        raise UsageError(f"argument --save-path: {path} is a file: give a folder")
    for file in (path / name for name in (*RUN_FILES, LOCK)):
        alone = file.name != LOCK and not (path / ARGS).exists()
        if os.path.lexists(file) and (alone or not file.is_file()):
            raise UsageError(f"argument --save-path: {file} is not a regular file of a run, beside an {ARGS}: move it away")
    if resume == LAST or resume is not None and resume.parent.resolve() == path.resolve():     # the run in the folder
        if overwrite:
            raise UsageError("argument --overwrite: it removes what --resume continues: give one of them")
        exist = {name for name in (CHECKPOINT, PREVIOUS, BEST, RESULTS) if (path / name).exists()}
        if resume == LAST and exist and not exist & {CHECKPOINT, PREVIOUS}:
            best = f", give --resume {path / BEST} --save-path {path}," if BEST in exist else ""
            raise UsageError(f"argument --resume: {path} holds a run that has lost its {CHECKPOINT} and {PREVIOUS}: restore one"
                             f"{best} or add --overwrite instead to start afresh")
    elif holds_run(path) and not overwrite:
        remedy = "give another" if resume else "add --resume to continue it"
        raise UsageError(f"argument --save-path: {path} holds a run: {remedy} or --overwrite to start afresh")


def check_evaluation_paths(path, predictions):
    """Raises UsageError for a file of --evaluate that is not there, or one of --predictions, if any, that cannot be written."""
    if not path.exists():
        raise UsageError(f"argument --evaluate: {path} does not exist: give a checkpoint, the folder of a run, or a state dict")
    if predictions and (predictions.suffix != ".csv" or predictions.exists() and not predictions.is_file()
                        or not predictions.parent.is_dir()):
        raise UsageError(f"argument --predictions: {predictions} is not the name of a .csv file in a folder that exists")
