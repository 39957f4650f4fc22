"""The files of a run: their names, writing them so that neither a kill nor a full disk breaks them, and reading them back.

What others may have written is opened only if it is a regular file.  Reading functions raise UsageError, which names the file,
for one that is missing, damaged or not what a run writes.
"""
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UsageError

TEMPORARY = ".tmp"
ARGS, LOG, METRICS, RESULTS = "args.json", "log.txt", "metrics.jsonl", "results.json"
INDICES, SPLIT, LOCK = "label_indices.txt", "split.json", ".lock"
CHECKPOINT, PREVIOUS, BEST = "checkpoint.pth", "checkpoint.prev.pth", "model_best.pth"
RUN_FILES = (ARGS, LOG, METRICS, RESULTS, INDICES, SPLIT, CHECKPOINT, PREVIOUS, BEST)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
LAST = True                 # --resume without a path: from the last checkpoint

FLAGS = {"dataset": str, "arch": str, "num_label": int, "seed": int, "mix_up": bool, "no_meta": bool, "data_path": str}
SESSION = {"device": str, "threads": int, "precision": str, "torch": str, "commit": (str, type(None))}


# Writing

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
    path = Path(path)
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
    """A file that grows.  What a full disk refuses is kept in memory and written when there is room again."""

    def __init__(self, path):
        self.path, self.file, self.pending = Path(path), open(path, "ab", buffering=0), b""
        self.error = None               # why the last attempt failed, or None

    def write(self, data):
        """data: bytes or text."""
        self.pending += data.encode(errors="backslashreplace") if isinstance(data, str) else data
        try:
            while self.pending:
                self.pending = self.pending[self.file.write(self.pending):]
            self.error = None
        except OSError as error:
            self.error = error

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
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        say(f"{folder}: this file system knows no locks: start no second run in there")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


# Reading

def read_bytes(path):
    """Returns the content of a regular file: to open a pipe would wait for ever."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error})") from None


def read_text(path):
    """Returns the text of a regular file in UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read ({error}): restore it") from None


def parse_json(path, text):
    """Returns the value of a JSON text; path: of the file that it is from."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is damaged: {text[:40]!r} is not JSON: restore it, or remove the run") from None


def check_fields(path, value, types):
    """Returns the value itself if it is a dict with these keys, of these types and finite; else raises UsageError."""
    if not isinstance(value, dict):
        raise UsageError(f"{path} is damaged: {str(value)[:40]!r} is no JSON object: restore it, or remove the run")
    for key, kind in types.items():
        found = value.get(key)
        if not isinstance(found, kind) or kind is int and found < 0 or isinstance(found, float) and not math.isfinite(found):
            raise UsageError(f"{path} is damaged: its {key} is {str(found)[:40]!r}: restore it, or remove the run")
    return value


def read_json(path, types):
    """Returns the dict in a JSON file, which has these keys, of these types."""
    return check_fields(path, parse_json(path, read_text(path)), types)


def read_flags(folder):
    """Returns the resolved flags of a run, from its args.json."""
    return check_fields(folder / ARGS, read_json(folder / ARGS, {"args": dict})["args"], FLAGS)


def read_split_sums(folder):
    """Returns split.json: the sums of a run's labeled images, "sha256", and of the labels of its data, "labels_sha256"."""
    return read_json(folder / SPLIT, {"sha256": str, "labels_sha256": str})


def read_results(folder):
    """Returns results.json of a finished run."""
    path = folder / RESULTS
    results = read_json(path, {"error_rate": dict, "steps": int, "seconds": (int, float), "args": dict, "sessions": list,
                               "labeled_error_rate": (float, type(None))})
    check_fields(path, results["error_rate"], dict.fromkeys(("last", "median_last_20", "best_test"), float)
                 | {"best_validation": (float, type(None))})
    check_fields(path, results["sessions"][-1] if results["sessions"] else None, SESSION)
    return results


def median_name(evaluations):
    """Returns what "median_last_20" of results.json is over, in a run with this number of evaluations."""
    if evaluations > 20:
        return "median of the last 20 evaluations"
    return "median of " + (f"all {evaluations} evaluations" if evaluations > 1 else "the only evaluation")


def read_metrics(folder):
    """Returns the records of metrics.jsonl, dicts of numbers with a "step"; without a last line that is cut off."""
    path = folder / METRICS
    records = [parse_json(path, line) for line in read_text(path).split("\n")[:-1]]
    for record in records:
        check_fields(path, record, dict.fromkeys(record if isinstance(record, dict) else (), (int, float)) | {"step": int})
    return records


def read_split(path, names=False):
    """Returns the indices in a label_indices.txt, a list of ints, checked against the split.json beside it, if there is one.

    names: whether it may be a list of file names instead, a list of str: "class/file", with or without a number behind it.
    """
    content = read_bytes(path)
    try:
        text = content.decode("utf-8-sig")          # with or without a byte order mark
    except UnicodeDecodeError as error:
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
    if path.name == INDICES and path.with_name(SPLIT).exists():
        if read_json(path.with_name(SPLIT), {"sha256": str})["sha256"] != hashlib.sha256(content).hexdigest():
            raise UsageError(f"{path} is not the split whose SHA-256 is in {SPLIT}: restore it")
    return entries


def holds_run(folder):
    """Returns whether a folder has a file of a run."""
    return any((folder / name).exists() for name in RUN_FILES)


def check_foreign(folder):
    """Raises UsageError, which names it, for a file in a folder that has the name of one of a run's, but is of no run."""
    found = [folder / name for name in (*RUN_FILES, LOCK) if os.path.lexists(folder / name)]
    if odd := next((path for path in found if not path.is_file()), None):
        raise UsageError(f"argument --save-path: {odd} is not a regular file: move it away")
    if holds_run(folder) and not (folder / ARGS).exists():
        odd = next(path for path in found if path.name != LOCK)
        raise UsageError(f"argument --save-path: {odd} is not a file of a run, as there is no {ARGS} beside it: move it away")


def check_paths(path, resume, overwrite):
    """Raises UsageError for a run folder that a command must not touch, or a checkpoint that is missing.

    resume: None, LAST or the path of a checkpoint.
    """
    if resume not in (None, LAST) and not resume.exists():
        raise UsageError(f"argument --resume: {resume}: no such checkpoint (a missing file never means a fresh start)")
    if path.exists() and not path.is_dir():
        raise UsageError(f"argument --save-path: {path} is a file: give a folder")
    check_foreign(path)
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
    if predictions and (predictions.suffix != ".csv" or predictions.exists() and not predictions.is_file()):
        raise UsageError(f"argument --predictions: {predictions} is not the name of a .csv file")
    if predictions and not predictions.parent.is_dir():
        raise UsageError(f"argument --predictions: {predictions.parent} is not a folder: make it first")
