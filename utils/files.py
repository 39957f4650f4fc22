"""Files that a kill cannot break and a full disk cannot take away."""
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp"
# The files of a run folder.
ARGS, LOG, METRICS, RESULTS = "args.json", "log.txt", "metrics.jsonl", "results.json"
INDICES, SPLIT, LOCK = "label_indices.txt", "split.json", ".lock"
CHECKPOINT, PREVIOUS, BEST = "checkpoint.pth", "checkpoint.prev.pth", "model_best.pth"
OURS = (ARGS, LOG, METRICS, RESULTS, INDICES, SPLIT, CHECKPOINT, PREVIOUS, BEST)
LAST = True                 # --resume without a path: from the last checkpoint


def printable(text):
    """Text that came from a file, such as a name, as a terminal or a log may show it: one line without control characters.

    What is not printable, a line break or an escape sequence for example, becomes what Python would write for it.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def holds_run(folder):
    """Whether a folder has a file of a run."""
    return any((folder / name).exists() for name in OURS)


@contextmanager
def temporary_name(path):
    """The path of a file that is made inside the block and takes the place of `path` in one step at its end.

    A kill at any moment leaves the old file or the new one; an exception, such as a full disk, leaves the old one.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        temporary.unlink(missing_ok=True)
        yield temporary
        os.replace(temporary, path)
    finally:                # `os.replace` leaves a second name of the file that is there already
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replacing(path, backup=None):
    """A binary file to write to, which takes the place of `path` as a `temporary_name` does, and lasts.

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
    with replacing(path) as file:
        file.write(text.encode())


def link(source, target):
    """Points target at the content of source, in one step for a reader."""
    with temporary_name(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:                     # a file system without hard links
            shutil.copyfile(source, temporary)


def sync(folder):
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_lock(path):
    """A file to lock, made if it is not there; its content stays.  Raises OSError for a symbolic link."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8", errors="replace")


def is_at(file, path):
    """Whether a path still leads to an open file: not if somebody has removed, moved or replaced it, or a folder above."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:             # a disk that does not answer: what is written next will say so
        return True


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
