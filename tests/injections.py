"""Faults injected into runs of the scripts, F1 onward: short forms in the test suite, all of them by `make torture`.

Each injection is a generator `inject(folder, tries, rng, patch)`: it yields, for each try, None if the run survived or
what was lost.  `patch` is None, or a function that takes one protection away in the process under test: then something
must be lost, or the injection proves nothing.  Runs are processes of their own, forked from a server that has already
loaded torch, and really killed.
"""
import argparse
import contextlib
import hashlib
import io
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from helpers import (
    FEW,
    FLAGS,
    ROOT,
    SERVER,
    Malicious,
    few_images,
    finish,
    finished_run,
    one_line,
    orphans,
    records,
    run,
    run_processes,
    slow_disk,
    start,
    state_of,
    tensors,
    unequal,
    wait_for,
    whole,
)

# F1, F2, F3, F14: kills and resumes

def killed(folder, tries, rng, patch=None):
    """SIGKILL at random moments while saving at every step, then --resume."""
    flags = [*FLAGS, "--test-freq", "1", "--total-steps", str(6 * tries)]
    parts, reached = folder / "parts", 0
    for i in range(tries):
        process = start([*flags, "--save-path", parts, "--resume"], slow_disk, patch, output=folder / "killed")
        if i % 5:                           # one in five in start-up
            wait_for(folder / "killed.out", "  loss ", process)
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        process.join()
        last = readable(parts)
        if process.exitcode not in (0, -signal.SIGKILL) or isinstance(last, str) or last < reached:
            yield f"exit code {process.exitcode} after step {reached}, then: {last}"
            return
        reached = last
        yield None
    code, _, error = run(folder, [*flags, "--save-path", parts, "--resume"], patch)
    yield error if code else unequal(whole(*flags), parts) or unequal(whole(*flags), parts, "model_best.pth")


def readable(folder):
    """The step that a resume would start from, or why it could not."""
    from utils import checkpoint

    try:
        last = checkpoint.load_last(folder)
    except checkpoint.UsageError as error:
        return str(error)
    return 0 if last is None else last[0]["step"]


def bare_save():
    from utils import checkpoint

    def save(state, folder):
        with open(Path(folder, "checkpoint.pth"), "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
    checkpoint.save = save


def dead_between_calls(folder, tries, rng, patch=None):
    """Death before and after each system call of a save."""
    code, _, error = run(folder, [*FLAGS, "--total-steps", "3", "--test-freq", "1", "--save-path", folder / "run"])
    assert code == 0, error
    names = ("checkpoint.pth", "checkpoint.prev.pth")
    before = {name: (folder / "run" / name).read_bytes() for name in names}
    for point in range(tries):
        for file in (folder / "run").iterdir():
            file.unlink()
        for name in names:
            (folder / "run" / name).write_bytes(before[name])
        process = SERVER.Process(target=save_and_die, args=(folder / "run", point, patch))
        process.start()
        process.join()
        last = readable(folder / "run")
        yield None if last in (3, 4) and process.exitcode in (0, 9) else f"at call {point}: {last}"
        if process.exitcode == 0:
            return


def save_and_die(folder, point, patch):
    """Saves step 4; dies before the system call number point // 2, or after it if point is odd."""
    from utils import checkpoint

    if patch:
        patch()
    state, calls = {**checkpoint.load(folder / "checkpoint.pth"), "step": 4}, [0]

    def mortal(call):
        def wrapped(*args, **kwargs):
            number = calls[0]
            calls[0] += 1
            if 2 * number == point:
                os._exit(9)
            try:
                return call(*args, **kwargs)
            finally:
                if 2 * number + 1 == point:
                    os._exit(9)
        return wrapped

    def in_two_halves(state, file):
        buffer = io.BytesIO()
        save(state, buffer)
        data = buffer.getvalue()
        for half in (data[:len(data) // 2], data[len(data) // 2:]):
            mortal(file.write)(half)

    save, torch.save = torch.save, in_two_halves
    for name in ("open", "fsync", "link", "unlink", "replace"):
        setattr(os, name, mortal(getattr(os, name)))
    checkpoint.save(state, folder)


def resumed(folder, tries, rng, patch=None):
    """Bitwise resume at k in {1, middle, a save, a save + 1, N - 1}, in every row of the ablation, then a second resume."""
    flags = [*FLAGS, "--test-freq", "3"]
    plain = [flag for flag in flags if flag != "--mix-up"]
    rows = flags, [*plain, "--no-meta", "--momentum", "0"], plain, [*flags, "--no-meta"]
    for i, (k, row) in enumerate(product((3, 1, 4, 5, 6), rows)):
        if i == tries:
            return
        parts = folder / str(i)
        for steps in (k, min(k + 2, 6), 7):
            code, _, error = run(folder, [*row, "--total-steps", steps, "--save-path", parts, "--resume"], patch)
            if code:
                break
        yield f"k = {k}: {error}" if code else unequal(whole(*row, "--total-steps", "7"), parts)


def no_rng():
    torch.set_rng_state = lambda state: None


def logged(folder, tries, rng, patch=None):
    """log.txt and metrics.jsonl over three kills and resumes."""
    flags = [*FLAGS, "--test-freq", "4", "--total-steps", "40"]
    for i in range(tries):
        path = folder / str(i)
        for _ in range(3):
            (folder / "output.out").unlink(missing_ok=True)
            process = start([*flags, "--save-path", path, "--resume"], slow_disk, patch, output=folder / "output")
            wait_for(folder / "output.out", "test error", process)           # the first save follows
            time.sleep(rng.uniform(0.1, 0.6))
            process.kill()
            process.join()
        code, _, error = run(folder, [*flags, "--save-path", path, "--resume"], patch)
        if code:
            yield error
            continue
        in_log = re.findall(r"^\S+ \S+  step (\d+)/40  loss", (path / "log.txt").read_text(), re.MULTILINE)
        try:
            in_metrics = [record["step"] for record in records(path) if "train/loss" in record]
        except ValueError as error:
            yield str(error)
            continue
        steps = list(range(1, 41))
        yield None if in_metrics == steps == list(map(int, in_log)) else f"{in_metrics} in metrics, {in_log} in the log"


def no_truncation():
    import utils.run_folder

    utils.run_folder.truncate_after = lambda *args, **options: None


# F4, F11, F12: files that are not what they were

def damaged(folder, tries, rng, patch=None):
    """Single-bit flips, one truncation to five flips, no checkpoint at all: seen, or without effect on what is read."""
    from utils import checkpoint

    code, _, error = run(folder, [*FLAGS, "--total-steps", "2", "--test-freq", "1", "--save-path", folder / "run"])
    assert code == 0, error
    path = folder / "run" / "checkpoint.pth"
    data, good = path.read_bytes(), tensors(checkpoint.load(path))
    with patch() if patch else contextlib.nullcontext():
        for i in range(tries):
            wrong = bytearray(data)
            if i % 6 == 5:
                del wrong[int(rng.integers(len(data))):]
            else:
                wrong[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            path.unlink()
            path.write_bytes(wrong)
            state, source = checkpoint.load_last(folder / "run")
            found = tensors(state)          # of other names, too, if the change was in one
            same = source == path and found.keys() == good.keys() and all(torch.equal(good[k], found[k]) for k in good)
            yield None if same or source != path else f"try {i}: a change was not seen"  # a name or padding may change unseen
        for content in (b"", b"hello", "folder", "unreadable"):
            path.unlink()
            if content == "folder":
                path.mkdir()
            else:
                path.write_bytes(data if content == "unreadable" else content)
            user = os.geteuid()
            if content == "unreadable":
                path.chmod(0)
                os.seteuid(user or 65534)       # root reads everything
            try:
                checkpoint.load(path)
                yield f"{content!r} was read"
            except checkpoint.UsageError as error:
                yield None if str(path) in str(error) else str(error)
            finally:
                os.seteuid(user)
            if content == "folder":
                path.rmdir()
                path.write_bytes(b"")


def no_testzip():
    return mock.patch("zipfile.ZipFile.testzip", lambda archive: None)


def malicious(folder, tries, rng, patch=None):
    """A pickle that runs a command, as --resume and as --checkpoint-path."""
    path = folder / "x.pth"
    torch.save({"step": 1, "model": Malicious(), "args": {}}, path)
    for i in range(tries):
        if i % 2:
            flags, script = ["--checkpoint-path", path, "--save-path", folder / "figure"], "plot_features"
        else:
            flags, script = [*FLAGS, "--save-path", folder / "run", "--resume", path], "train_meta"
        code, _, error = run(folder, flags, partial(os.chdir, folder), patch, script=script)
        fault = one_line(code, 2, error, str(path), "could run code")
        left = sorted(file.name for file in folder.iterdir() if not file.name.startswith("output"))
        yield fault or (None if left == ["x.pth"] else f"it left {left}")


def any_pickle():
    load = torch.load
    torch.load = lambda path, **kwargs: load(path, map_location="cpu", weights_only=False)


def tiny_cifar(root):
    """50 training and 10 test images in the format of CIFAR-10; file name -> sum, to be entered in torchvision's table."""
    from torchvision.datasets import CIFAR10

    base, rng = root / CIFAR10.base_folder, np.random.default_rng(0)
    base.mkdir(parents=True)
    files = {name: {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
             for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)}
    files[CIFAR10.meta["filename"]] = {"label_names": [f"class {k}" for k in range(10)]}
    for name, content in files.items():
        (base / name).write_bytes(pickle.dumps(content))
    return {name: hashlib.md5((base / name).read_bytes()).hexdigest() for name in files}


def other_sums(sums):
    """CIFAR-10 is now the files with these sums, and there is no network."""
    from torchvision.datasets import CIFAR10, utils

    def no_network(*args, **kwargs):
        raise URLError("no network")

    CIFAR10.train_list = [[name, sums[name]] for name, _ in CIFAR10.train_list]
    CIFAR10.test_list = [[name, sums[name]] for name, _ in CIFAR10.test_list]
    CIFAR10.meta = {**CIFAR10.meta, "md5": sums[CIFAR10.meta["filename"]]}
    utils._urlretrieve = no_network


def data_file(folder, tries, rng, patch=None):
    """A data set file flipped, truncated, missing, without a network; digits always works."""
    sums = tiny_cifar(folder)
    flags = [*FLAGS, "--total-steps", "1", "--save-path", folder / "run"]
    cifar = [*flags, "--dataset", "cifar10", "--num-label", "10", "--data-path", folder]
    path = folder / "cifar-10-batches-py" / "data_batch_3"
    data = path.read_bytes()
    for i in range(tries):
        wrong = bytearray(data)
        if i % 3 == 0:
            wrong[-int(rng.integers(200, 3000))] ^= 1 << int(rng.integers(8))       # a pixel
        path.write_bytes(wrong[:int(rng.integers(len(data)))] if i % 3 == 1 else wrong)
        if i % 3 == 2:
            path.unlink()
        code, _, error = run(folder, cifar, partial(other_sums, sums), patch)
        yield one_line(code, 2, error, str(path), sums[path.name]) or (
            "it wrote something" if (folder / "run").exists() else None)
    path.write_bytes(data)
    for intact in (cifar, flags):
        code, _, error = run(folder, [*intact, "--overwrite"], partial(other_sums, sums), patch)
        yield error if code else None


def no_sums():
    from torchvision.datasets import CIFAR10

    CIFAR10._check_integrity = lambda self: True


# F5: disk full

def disk_full(folder, tries, rng, patch=None):
    """A file-size limit that fails every write over a while of the run; lifted again, or not before the last save."""
    flags = [*FLAGS, "--total-steps", "6", "--test-freq", "1"]
    for i in range(tries):
        path, limit, last = folder / str(i), int(rng.choice([0, 500, 3000, 100_000])), i % 2 == 1
        code, _, error = run(folder, [*flags, "--save-path", path], partial(limited, limit, 2, 99 if last else 5), patch)
        left = [file.name for file in path.iterdir() if file.name.endswith(".tmp")]
        kept = readable(path)
        warned = "step 3 could not be saved" in (path / "log.txt").read_text()
        if left or kept != (2 if last else 6) or not (warned or last):
            yield f"limit {limit}: {left} left, step {kept} kept, exit code {code}: {error}"
            continue
        if last:
            fault = one_line(code, 1, error) if limit > 500 else code != 1       # the output is a file too
            code, _, error = run(folder, [*flags, "--save-path", path, "--resume"], patch)
            if fault or code:
                yield fault or error
                continue
        same = records(path) == records(whole(*flags))
        yield unequal(whole(*flags), path) or (None if same else "records are missing")


def limited(limit, first, last):
    """After `first` saves no file grows beyond `limit` bytes, until after `last` attempts to save."""
    from utils.run_folder import RunFolder

    save, attempts = RunFolder.save, [0]

    def counted(self, *args, **kwargs):
        try:
            return save(self, *args, **kwargs)
        finally:
            attempts[0] += 1
            if attempts[0] == first:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            elif attempts[0] == last:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    RunFolder.save = counted


def every_failure_ends():
    from utils import run_folder

    save = run_folder.RunFolder.save
    run_folder.RunFolder.save = lambda self, seconds, last: save(self, seconds)


# F6, F23: signals

def signaled(folder, tries, rng, patch=None):
    """SIGTERM, SIGINT or SIGUSR1 to the process or its group at random moments, also in start-up, evaluation and a save."""
    few = [*FEW, "--data-path", few_images(folder / "images", 100), "--num-workers", "2"]
    flags = [*FLAGS, "--test-freq", "3", "--total-steps", "60"]
    for i in range(tries):
        path, row = folder / str(i), flags
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[i % 3]
        if i % 5 == 4:                      # while worker processes decode
            row = [*flags, *few]
        process = start([*row, "--save-path", path], slow_disk, slow_evaluation, patch, output=folder / "output")
        time.sleep(rng.uniform(0.05, 2.0))
        (os.killpg if i % 2 else os.kill)(process.pid, number)
        yield badly_stopped(process, folder / "output", path, 130 if number == signal.SIGINT else 143)


def badly_stopped(process, output, path, expected):
    """What is wrong with the end of a run that got a signal, or None."""
    code = finish(process)
    error, out = (Path(f"{output}.{name}").read_text() for name in ("err", "out"))
    stopped = re.search(r"stopped by a signal at step (\d+)/", out)
    if code != expected:
        return f"exit code {code}, not {expected}: {error}"
    if stopped and (error or readable(path) != int(stopped[1])):
        return f"stopped at step {stopped[1]}, kept {readable(path)}: {error}"
    if not stopped and one_line(1, 1, error, "stopped by a signal before the first step"):
        return error or out
    return orphans(process.pid)


def slow_evaluation():
    from utils import evaluation

    evaluate = evaluation.evaluate

    def slow(model, batches, dtype, stop, add):
        def paused():
            for batch in batches:
                for part in zip(*(tensor.split(50) for tensor in batch)):
                    time.sleep(0.01)
                    yield part
        return evaluate(model, paused(), dtype, stop, add)
    evaluation.evaluate = slow


def default_signals():
    from utils.interrupt import Interrupt

    Interrupt.listen = lambda self: None


def closed_terminals(folder, tries, rng, patch=None):
    """SIGHUP and SIGXCPU, repeated, to the group of a run."""
    few = [*FEW, "--data-path", few_images(folder / "images", 100), "--num-workers", "2"]
    flags = [*FLAGS, "--test-freq", "3", "--total-steps", "100000"]
    for i in range(tries):
        path = folder / str(i)
        row = [*flags, *few] if i % 3 == 2 else flags           # while worker processes decode
        (folder / "output.out").unlink(missing_ok=True)
        process = start([*row, "--save-path", path], slow_disk, patch, output=folder / "output")
        wait_for(folder / "output.out", "  loss ", process)
        for _ in range(3):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, (signal.SIGXCPU, signal.SIGHUP)[i % 3 != 1])
            time.sleep(rng.uniform(0, 0.01))
        yield badly_stopped(process, folder / "output", path, 143)


def old_signals():
    from utils import interrupt

    interrupt.SIGNALS = interrupt.SIGNALS[:3]


# F7, F13: numbers

def not_finite(folder, tries, rng, patch=None):
    """NaN or infinity in the input, the weights, the loss or the gradient alone."""
    flags = [*FLAGS, "--test-freq", "2", "--print-freq", "3", "--total-steps", "9"]
    for i in range(tries):
        kind, value = ("gradient", "input", "weights", "loss")[i % 4], (float("nan"), float("inf"))[i // 4 % 2]
        path = folder / str(i)
        code, _, error = run(folder, [*flags, "--save-path", path], partial(spoiled, kind, value), patch)
        finite = all(w.isfinite().all() for w in tensors(state_of(path)).values() if w.is_floating_point())
        yield one_line(code, 1, error, "not finite at step 5", "at step 4", "checkpoint.pth of step 4 is intact") or (
            unequal(whole(*flags, "--total-steps", "4"), path) if finite else "the last file is not finite")


def spoiled(kind, value):
    """At step 5, one number is `value`; an update after that would end the run in another way."""
    import metasemi

    step, calls = metasemi.training_step, [0]

    def spoiling(model, optimizer, x_l, y_l, x_u, **options):
        calls[0] += 1
        if calls[0] > 5:
            return step(model, optimizer, x_l, y_l, x_u, **options)
        weight = next(model.parameters())
        before = weight.detach().clone()
        if calls[0] == 5:
            if kind == "input":
                x_l = x_l.index_fill(0, torch.tensor([0]), value)
            elif kind == "weights":
                weight.data[0] = value
            elif kind == "loss":
                options["weight"] = 1e308       # times the consistency loss in float32: infinity
            else:
                weight.register_hook(lambda g: g + value)
        result = step(model, optimizer, x_l, y_l, x_u, **options)
        if calls[0] == 5 and kind != "weights" and not torch.equal(before, weight):
            os._exit(7)                     # the update was not left out
        return result
    metasemi.training_step = spoiling


def no_finite_check():
    from utils import meters, state

    meters.Meter.check = lambda self: None
    state.all_finite = lambda tensors: True


def permuted(folder, tries, rng, patch=None):
    """The labels of the unlabeled images and the test set permuted: the training must not notice."""
    flags = [*FLAGS, "--total-steps", "5", "--test-freq", "9"]
    run(folder, [*flags, "--save-path", folder / "plain"], patch)
    seen = [record.get("train/unlabel-acc") for record in records(folder / "plain")]
    for i in range(tries):
        path = folder / str(i)
        code, _, error = run(folder, [*flags, "--save-path", path], partial(other_labels, int(rng.integers(2 ** 31))), patch)
        if code:
            yield error
            continue
        assert seen != [record.get("train/unlabel-acc") for record in records(path)]        # the telemetry does notice
        a, b = (tensors({key: state_of(f)[key] for key in ("model", "optimizer", "rng")}) for f in (folder / "plain", path))
        yield None if all(torch.equal(a[key], b[key]) for key in a) else "the weights differ"


def other_labels(seed):
    from utils import setup

    load = setup.load_dataset
    labels = load("digits", ".").train_labels
    labeled, validation = setup.split_training(labels, 50, 0, 10, 1)
    setup.split_training = lambda *args: (labeled, validation)
    rng = np.random.default_rng(seed)

    def load_permuted(*args, **options):
        images = load(*args, **options)
        unlabeled = np.setdiff1d(np.arange(len(labels)), labeled)
        images.train_labels[unlabeled] = images.train_labels[rng.permutation(unlabeled)]
        order = torch.from_numpy(rng.permutation(len(images.test_labels)))
        return images._replace(test_images=images.test_images[order])
    setup.load_dataset = load_permuted


def leaking_labels():
    from datasets import batches

    call = batches.Batches.__call__

    def leaking(self, step):
        batch = call(self, step)
        return batch._replace(x_u=batch.x_u + 1e-3 * batch.y_u[:, None, None, None])
    batches.Batches.__call__ = leaking


# F8, F9, F10, F15: commands

def wrong_lines(folder, tries, rng, patch=None):
    """Wrong command lines over both scripts, each in a process of its own, from the shell's point of view, without torch."""
    from test_command_line import WRONG, make_files

    make_files(folder)
    (folder / "stub").mkdir()
    (folder / "stub" / "torch.py").write_text("raise SystemExit('torch was loaded')\n")
    path = {"PYTHONPATH": f"{folder / 'stub'}{os.pathsep}{os.environ['PYTHONPATH']}"}
    before = sorted(folder.rglob("*"))
    chosen = WRONG if tries >= len(WRONG) else [WRONG[i] for i in rng.permutation(len(WRONG))[:tries]]
    for script, flags, parts in chosen:
        if patch:
            with pytest.MonkeyPatch.context() as inside:
                inside.chdir(folder)
                code, _, error = run(folder.parent, flags, patch, script=script)
        else:
            done = subprocess.run([sys.executable, ROOT / f"{script}.py", *flags], cwd=folder, capture_output=True, text=True,
                                  env={**os.environ, **path})
            code, error = done.returncode, done.stderr
        yield one_line(code, 2, error, *parts) or (None if sorted(folder.rglob("*")) == before else "it wrote something")


def lines_of_argparse():
    from utils.cli import Parser

    Parser.error = argparse.ArgumentParser.error


def random_milestones(folder, tries, rng, patch=None):
    """Random strings to the milestone parser."""
    from utils import cli

    parse = patch or cli.parse_milestones
    alphabet = list("[](){}0123456789,,,   -+._eExX'\"#\n\t\x00abcdef__import__os.system²٣")
    for _ in range(tries):
        text = "".join(rng.choice(alphabet, size=int(rng.integers(0, 30))))
        try:
            steps = parse(text)
        except ValueError:
            yield None
            continue
        except Exception as error:
            yield f"{text!r}: {error!r}"
            continue
        good = all(type(step) is int and step > 0 for step in steps) and steps == sorted(set(steps))
        yield None if good else f"{text!r}: {steps}"


def parse_carelessly(text):
    return [int(part) for part in text.strip("[]").replace(",", " ").split()]


def two_runs(folder, tries, rng, patch=None):
    """Two processes on one folder, and the same command again on the finished run."""
    flags = [*FLAGS, "--test-freq", "5", "--total-steps", "10"]
    for i in range(tries):
        path, ended = folder / str(i), folder / f"ended{i}"
        flags_here = [*flags, "--save-path", path, *(["--resume"] if i % 2 else [])]
        (folder / "first.out").unlink(missing_ok=True)      # what the run before has said
        first = start(flags_here, partial(saving_after, ended), patch, output=folder / "first")
        wait_for(folder / "first.out", "parameters", first)
        code, _, error = run(folder, flags_here, patch)
        ended.touch()
        first_code = finish(first)
        fault = one_line(code, 2, error, *([f"in use by process {first.pid}"] if i % 2 else ["holds a run"]))
        if fault or first_code:
            yield fault or f"the first run ended with {first_code}"
            continue
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        code, _, error = run(folder, [*flags, "--save-path", path])
        unchanged = before == {file.name: file.read_bytes() for file in path.iterdir()}
        yield one_line(code, 2, error, "holds a run") or (None if unchanged else "files changed")


def saving_after(file):
    """No save begins before a file is there."""
    save = torch.save

    def wait(*args):
        deadline = time.monotonic() + 600
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        save(*args)
    torch.save = wait


def no_lock():
    import fcntl

    fcntl.flock = lambda *args: None


def odd_places(folder, tries, rng, patch=None):
    """Paths with spaces, unicode and %, a symlinked run folder, a pipe that breaks."""
    flags = [*FLAGS, "--total-steps", "3", "--test-freq", "2"]
    (folder / "elsewhere").mkdir()
    (folder / "link").symlink_to(folder / "elsewhere")
    places = ("broken", "with space", "ünï ☃", "100 % {x} $HOME", "link", "a:b", "run:x")
    for name in places[:tries]:
        path = folder / name
        for steps in (2, 3):
            process = start([*flags, "--total-steps", steps, "--save-path", path, "--resume"],
                            broken_pipe if name == "broken" else None, patch, output=folder / "output")
            code = finish(process)
            if code:
                break
        fault = f"{name}: exit code {code}" if code else unequal(whole(*flags), path)
        if not fault and records(path) != records(whole(*flags)):
            fault = f"{name}: the records differ"
        yield fault


def broken_pipe():
    """Makes standard output a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


def careless_output():
    from utils.run_folder import RunFolder

    RunFolder.print = lambda self, *messages: [print(message, flush=True) for message in messages]


def odd_values(folder, tries, rng, patch=None):
    """An ASCII terminal, and for every flag of the three scripts a value of 400 or 5,000 digits or letters, or --"""
    flags = [*FLAGS, "--total-steps", "1", "--save-path", folder / "ünï ☃", "--resume"]
    for said in ("images", r"n\xef \u2603: finished at step 1"):
        code, out, error = run(folder, flags, ascii_terminal, patch)
        yield error if code else None if said in out else f"{said!r} is not in {out!r}"
    before = sorted(folder.rglob("*"))
    required = {"train_meta": ["--dataset", "folder", "--data-path", "x"], "reproduce": ["main", "--dry-run"],
                "plot_features": ["--save-path", "figure", "--checkpoint-path", "x"]}
    cases = [(script, f"{flag}={value}") for script, flag in valued_flags()
             for value in ("--", *(character * count for character in "1a" for count in (400, 5000)))]
    for i in rng.permutation(len(cases))[:tries]:
        script, word = cases[i]
        with pytest.MonkeyPatch.context() as inside:
            inside.chdir(folder)
            code, _, error = run(folder, [*required[script], word], patch, script=script)
        yield one_line(code, 2, error, word.partition("=")[0]) or (
            None if sorted(folder.rglob("*")) == before else "it wrote something")


def valued_flags():
    """(script, flag) of all that take a value, but those for which any text is one."""
    from plot_features import plotting_parser
    from utils.flags import training_parser

    for script, parser, free in (("train_meta", training_parser(), ()),
                                 ("plot_features", plotting_parser(), ("row_label", "arch"))):
        for action in parser._actions:
            if action.nargs != 0 and action.dest not in free:
                yield script, action.option_strings[-1]
    yield from (("reproduce", flag) for flag in ("--dataset", "--seeds", "--scale", "--gpus", "--jobs"))


def ascii_terminal():
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def careless_values():
    from utils import cli, flags

    for module in (cli, flags):
        module.path, module.number = Path, lambda kind, **bounds: lambda text: kind(float(text))
    cli.Parser.parse_known_args = argparse.ArgumentParser.parse_known_args


# F25: networks of the user's own

OWN = """import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head, self.calls = nn.Linear(768, num_classes), 0
        {}

    def forward(self, x):
        self.calls += self.training
        fails = self.calls == 7     # in step 4, the first after a save
        logits = self.head(x.flatten(1))
        {}
"""
MISBEHAVIOR = [     # constructor, end of forward; exit code, parts of the line
    ("", "return logits if fails else logits / (1 // 0)", 2, ["fails in evaluation mode", "ZeroDivisionError"]),
    ("", "return int('x') if fails else logits", 1, ["fails at step 4", "line 15: ValueError", "of step 3 is intact"]),
    ("", "return logits[:-1] if fails else logits", 1, ["fails at step 4: ValueError", "of step 3 is intact"]),
    ("", "return open('gone') if fails else logits", 1, ["fails at step 4", "line 15: FileNotFoundError", "is intact"]),
    ("", "return logits.detach() if fails else logits", 0, []),
    ("", "return logits.softmax(dim=1)", 0, []),
    ("self.register_buffer('mask', torch.full((9,), -torch.inf))", "return logits", 0, []),
    ("self.again = self.head", "return logits + self.again(x.flatten(1))", 0, []),
    ("self.bn = nn.BatchNorm1d(num_classes)", "return self.bn(logits)", 2, ["take a larger --batch-size"]),
]


def misbehaving(folder, tries, rng, patch=None):
    """A network of the user's own that fails at once or later, shares a layer, or is not quite a network."""
    for i, (*parts, expected, said) in enumerate(MISBEHAVIOR[:tries]):
        (folder / "net.py").write_text(OWN.format(*parts))
        path = folder / str(i)
        one = ["--batch-size", "1"] if "larger --batch-size" in " ".join(said) else []
        code, out, error = run(folder, [*FLAGS, *one, "--total-steps", "5", "--test-freq", "3", "--save-path", path,
                                        "-a", f"{folder / 'net.py'}:Net"], patch)
        fault = one_line(code, expected, error, *said) if expected else error[-300:] or (f"exit code {code}" if code else None)
        if expected == 2 and path.exists():
            fault = fault or "it wrote something"
        if "softmax" in parts[1] and out.count("gives probabilities") != 1:
            fault = fault or "no warning was said"
        yield fault


def no_own_network():
    from utils import evaluation, trial

    trial.network_failures = evaluation.network_failures = lambda name, step=None: contextlib.nullcontext()


# F19: reports

def reported(folder, tries, rng, patch=None):
    """Foreign and damaged files under reproduce.py, two of them at once, and a locale without UTF-8."""
    from utils.files import lock

    with pytest.MonkeyPatch.context() as inside, patch() if patch else contextlib.nullcontext():
        inside.chdir(folder)
        both, supervised = map(finished_run, ("both", "supervised"))
        readme, table = "Müller ± 1\n<!-- cells -->\n<!-- end -->\n", Path("results", "runs.csv")
        Path("README.md").write_text(readme, encoding="utf-8")
        flags = ["main", "--dataset", "digits", "--scale", "0.01", "--publish"]
        done = subprocess.run([sys.executable, ROOT / "reproduce.py", *flags], capture_output=True,
                              env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"})
        text = Path("README.md").read_text(encoding="utf-8")
        yield None if (done.returncode, done.stderr) == (0, b"") and text.startswith(readme[:20]) and "±" in text else (
            f"exit code {done.returncode}: {done.stderr[-300:]}")
        lines = table.read_text(encoding="utf-8")
        foreign = (supervised / "results.json").read_text(encoding="utf-8")
        results, metrics = ((both / name).read_text(encoding="utf-8") for name in ("results.json", "metrics.jsonl"))
        cases = [
            (both / "results.json", foreign), (both / "results.json", results.replace('"seed": 1,', '"seed": 2,')),
            (both / "results.json", results[:-9]), (both / "results.json", "[" * 100_000), (both / "results.json", "{}"),
            (both / "results.json", results.replace("5.0", "NaN")), (both / "results.json", results.replace("8", "9" * 5000)),
            (both / "metrics.jsonl", "hello\n"), (both / "metrics.jsonl", metrics.replace("0.1", '"0.1"')),
            (both / "metrics.jsonl", metrics[:200]), (both / "metrics.jsonl", metrics.replace('"step"', '"stop"')),
            (table, f"<<<<<<< HEAD\n{lines}=======\n{lines}>>>>>>> other\n"), (table, "hello"),
            (table, lines + lines.partition("\n")[2]),
            (table, lines.replace("digits", "mnist")), (table, lines.replace(",both,", ",all,")),
            (table, lines + "digits,both\n"), (table, lines.replace("5.0", "five")), (table, lines.replace("seed", "Seed")),
            (Path("README.md"), text.replace("cells", "sells")), (Path("README.md"), text.replace("<!-- end -->", ""))]
        first = lock(Path("results"))
        yield one_line(*refused(flags), "results is in use by process")
        first.close()
        for path, content in cases[:tries]:
            before = path.read_bytes()
            path.write_text(content, encoding="utf-8")
            kept = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file() and file.name != ".lock"}
            fault = one_line(*refused(flags), str(path))
            changed = [str(file) for file, data in kept.items() if file.read_bytes() != data]
            yield fault and f"{path}, {content[:40]!r}: {fault}" or (f"{changed} changed" if changed else None)
            path.write_bytes(before)


def refused(flags):
    """(exit code, 2, standard error) of reproduce.py in this process; an error that it lets through in place of the code."""
    import reproduce

    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()):
        try:
            code = reproduce.main(flags)
        except SystemExit as end:
            code = end.code
        except Exception as fault:
            code = repr(fault)
    return code, 2, error.getvalue()


def believing():
    """Any results.json is that of the run in whose folder it lies."""
    return mock.patch("reproduction.run.differing", lambda *args: None)


# F20: numbers that are none

def no_numbers(folder, tries, rng, patch=None):
    """A batch variance that became negative: finite weights, and logits that are not a number in evaluation mode."""
    flags = [*FLAGS, "--no-meta", "--test-freq", "2", "--total-steps", "6", "--save-path", folder / "run"]
    flags.remove("--mix-up")
    code, _, error = run(folder, flags, partial(negative_variance, 3), patch)
    yield one_line(code, 1, error, "images are not finite in evaluation mode at step 4", "checkpoint.pth of step 2 is intact")
    state = state_of(folder / "run")
    spoil(state["model"])
    torch.save(state, folder / "spoiled.pth")
    flags = ["--evaluate", folder / "spoiled.pth", "--predictions", folder / "p.csv"]
    code, out, error = run(folder, flags, patch)
    yield one_line(code, 2, error, str(folder / "spoiled.pth"), "images are not finite") or out or (
        "it wrote predictions" if (folder / "p.csv").exists() else None)
    flags = ["--checkpoint-path", folder / "spoiled.pth", "--save-path", folder / "figure", "--method", "pca"]
    code, out, error = run(folder, flags, patch, script="plot_features")
    yield one_line(code, 2, error, str(folder / "spoiled.pth"), "are not finite") or out or None


def spoil(state):
    next(value for name, value in state.items() if name.endswith("running_var")).fill_(-1)


def negative_variance(first):
    import metasemi

    step, calls = metasemi.training_step, [0]

    def spoiling(model, *args, **options):
        result, calls[0] = step(model, *args, **options), calls[0] + 1
        if calls[0] >= first:
            spoil(model.state_dict())
        return result
    metasemi.training_step = spoiling


def any_logits():
    from utils import evaluation

    evaluation.check_finite = lambda logits: logits


# F16, F17: processes, and data, of another experiment

def disagreeing(folder, tries, rng, patch=None):
    """Two processes of which one has other flags, a wrong one, other data or another network; or another place alone."""
    for place, seed in (("here", 0), ("moved", 0), ("pixels", 1), ("file", 0)):
        few_images(folder / place, seed=seed)
        (folder / place / "net.py").write_text("from models import build_model\ndef Net(num_classes):\n"
                                               f"    return build_model('convsmall', num_classes)  # {seed}\n")
    (folder / "file" / "test" / "ant" / "4.bmp").write_bytes((folder / "file" / "test" / "ant" / "3.bmp").read_bytes())
    own = ["-a", "net.py:Net"]
    cases = [(["--seed", "2"], "moved", "--seed 2, not 1"), (["--lr", "fast"], "moved", "--lr: 'fast' is not a number"),
             ([], "pixels", "training pixels"), (own, "pixels", "SHA-256 of --arch"), ([], "file", "names of test files"),
             ([*own, "--num-workers", "1", "--save-path", folder / "x"], "moved", None),
             *((["--" + name, value], "moved", f"--{name} {value}, not ") for name, value in (
                 ("alpha", "0.5"), ("meta-lr", "0.2"), ("precision", "bfloat16"), ("batch-size", "2"), ("num-label", "2"),
                 ("total-steps", "4"), ("print-freq", "2"), ("test-freq", "2")))]
    flags = [*FLAGS, *FEW, "--total-steps", "3", "--save-path", folder / "run", "--data-path", "."]
    for odd, place, message in cases[:tries]:
        first = [*flags, *own] if odd[:2] == own else flags
        codes, error = run_processes(folder, [first, [*flags, *odd]], partial(stand, folder / "here", folder / place), patch)
        if message is None:
            fault = None if (codes, error) == ([0, 0], "") else error
        else:
            said = [line for line in error.splitlines(keepends=True) if message in line]
            fault = one_line(2, 2, said[0] if said else error, message) or (
                "it wrote something" if (folder / "run").exists() else "" if 2 in codes and 0 not in codes else str(codes))
        yield f"{odd} in {place}: exit codes {codes}: {fault}" if fault else None
        if (folder / "run").exists():
            shutil.rmtree(folder / "run")


def stand(*places):
    os.chdir(places[int(os.environ["RANK"])])


def other_data(folder, tries, rng, patch=None):
    """A run is plotted and resumed with data that changed, or that only moved."""
    flags = [*FLAGS, *FEW, "--test-freq", "1", "--total-steps"]
    code, _, error = run(folder, [*flags, "2", "--save-path", folder / "run", "--data-path", few_images(folder / "then")])
    assert code == 0, error

    def rename(old, new):
        return lambda now: (now / old).rename(now / new)

    def other_pixels(now):
        shutil.rmtree(now)
        few_images(now, seed=1)

    cases = [("training pixels, test pixels", other_pixels), (None, lambda now: None),
             ("names of training files", rename("train/ant/0.bmp", "train/ant/z.bmp")),
             ("class names", lambda now: [(now / part / "ant").rename(now / part / "asp") for part in ("train", "test")]),
             ("test labels", lambda now: (now / "test" / "bee" / "3.bmp").unlink())]
    for message, change in cases[:tries]:
        for name in ("now", "copy"):
            shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(folder / "run", folder / "copy")
        change(few_images(folder / "now"))
        checkpoint, place = folder / "copy" / "checkpoint.pth", ["--data-path", folder / "now", "--num-workers", "0"]
        figure = ["--checkpoint-path", checkpoint, "--save-path", folder / "figure", "--method", "pca", *place]
        before = sorted((folder / "copy").rglob("*"))
        for script, line in (("plot_features", figure), ("train_meta", [*flags, "3", "--save-path", folder / "copy", "--resume",
                                                                        *place])):
            code, _, error = run(folder, line, patch, script=script)
            if message:
                same = sorted((folder / "copy").rglob("*")) == before
                yield one_line(code, 2, error, message) or (None if same else "it wrote something")
            else:
                yield error if code else None


def no_digest():
    from utils import setup

    setup.differing = lambda now, then: []


def no_agreement():
    from utils import setup

    setup.check_same_processes = lambda *args: None


# F21: images

def hostile_images(folder, tries, rng, patch=None):
    """Image files that start a program, are cut off, huge or no pictures, pipes, hidden files, deep pixels, odd names"""
    from PIL import Image

    ghostscript, ran = folder / "bin" / "gs", folder / "ran"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {ran}\n")
    ghostscript.chmod(0o755)
    picture = few_images(folder / "picture") / "train" / "ant" / "0.bmp"
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    deep = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    cases = [                   # name, what makes the file; what is said of it, or None where it is an image
        ("script.png", lambda path: path.write_bytes(script), "script.png cannot be read as an image"),
        ("cut.bmp", lambda path: path.write_bytes(picture.read_bytes()[:200]), "cut.bmp cannot be read as an image"),
        ("bomb.png", lambda path: Image.new("1", (20_000, 20_000)).save(path), "bomb.png cannot be read as an image"),
        ("text.jpg", lambda path: path.write_text("hello"), "text.jpg cannot be read as an image"),
        ("pipe.png", os.mkfifo, "1 not a regular file"), ("._x.png", Path.touch, "1 hidden"),
        ("x.doc", Path.touch, "1 of another suffix"), ("x.png", Path.mkdir, "1 a folder in a class folder"),
        ("deep.png", deep.save, None), ("\udcff\x1b[2J.bmp", lambda path: shutil.copy(picture, path), None)]
    for i, (name, make, said) in enumerate(cases[:tries]):
        root, refused = few_images(folder / f"images{i}"), said and "cannot" in said
        make(root / "train" / "ant" / name)
        flags = [*FEW, "--data-path", root, "-a", "convsmall", "--total-steps", "1"]
        for skip in ([], ["--skip-corrupt"]):
            code, out, error = run(folder, [*flags, *skip, "--save-path", folder / f"run{i}{len(skip)}"],
                                   partial(found_first, ghostscript.parent), patch)
            if refused and not skip:
                fault = one_line(code, 2, error, said)
            else:
                fault = error[-300:] or (code and f"exit code {code}")
                if said and not refused and said not in out:
                    fault = fault or f"{said!r} is not in {out[:300]!r}"
            fault = fault or ("a program was started" if ran.exists() else None)
            ran.unlink(missing_ok=True)
            yield fault or ("an escape sequence is printed" if "\x1b" in out else None)


def found_first(folder):
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def any_format():
    from datasets import decoding

    decoding.readable_formats = lambda: (None, tuple(decoding.Image.registered_extensions()))


class Injection(NamedTuple):
    inject: object
    without: object         # the protection taken away
    short: int              # tries in the test suite
    full: int               # and by `make torture`


INJECTIONS = {
    "F1": Injection(killed, bare_save, 5, 50),
    "F2": Injection(dead_between_calls, bare_save, 99, 99),
    "F3": Injection(resumed, no_rng, 4, 20),
    "F4": Injection(damaged, no_testzip, 60, 360),
    "F5": Injection(disk_full, every_failure_ends, 2, 20),
    "F6": Injection(signaled, default_signals, 5, 60),
    "F7": Injection(not_finite, no_finite_check, 4, 16),
    "F8": Injection(wrong_lines, lines_of_argparse, 4, 1000),
    "F9": Injection(random_milestones, parse_carelessly, 2000, 10_000),
    "F10": Injection(two_runs, no_lock, 2, 20),
    "F11": Injection(malicious, any_pickle, 2, 10),
    "F12": Injection(data_file, no_sums, 3, 30),
    "F13": Injection(permuted, leaking_labels, 1, 10),
    "F14": Injection(logged, no_truncation, 1, 10),
    "F15": Injection(odd_places, careless_output, 3, 7),
    "F16": Injection(disagreeing, no_agreement, 3, 99),
    "F17": Injection(other_data, no_digest, 3, 99),
    "F19": Injection(reported, believing, 99, 99),
    "F20": Injection(no_numbers, any_logits, 3, 3),
    "F21": Injection(hostile_images, any_format, 5, 99),
    "F23": Injection(closed_terminals, old_signals, 3, 30),
    "F24": Injection(odd_values, careless_values, 6, 100),
    "F25": Injection(misbehaving, no_own_network, 2, 99),
}
