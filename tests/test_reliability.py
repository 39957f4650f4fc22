"""What a run survives: the short forms of the injections, and what they do not reach."""
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT
from helpers import FEW, FLAGS, differing, few_images, finish, on_terminal, one_line, run, start
from hypothesis import given, settings
from hypothesis import strategies as st
from injections import INJECTIONS
from test_datasets import make_folder

import plot_features
import train_meta
from plot_features import parse as parse_plotting
from plot_features import plotting_parser
from utils import checkpoint
from utils.errors import UsageError, printable
from utils.experiment import resolve_flags
from utils.files import read_split
from utils.flags import training_parser
from utils.interrupt import REPEATED, Interrupt, exit_code
from utils.state import SCHEMA


def lost(name, folder, tries, patch=None):
    return [fault for fault in INJECTIONS[name].inject(folder, tries, np.random.default_rng(0), patch) if fault]


@pytest.mark.parametrize("name", INJECTIONS)
def test_nothing_is_lost(tmp_path, name):
    assert lost(name, tmp_path, INJECTIONS[name].short) == []


@pytest.mark.parametrize("name", INJECTIONS)
def test_without_its_protection_something_is_lost(tmp_path, name):
    assert lost(name, tmp_path, INJECTIONS[name].short, INJECTIONS[name].without) != []


def test_a_kill_between_a_checkpoint_and_its_copy_as_the_best_one_loses_nothing(train, whole, tmp_path):
    train("a", "--total-steps", "3")
    (tmp_path / "a" / "model_best.pth").unlink()
    train("a", "--resume")
    assert differing(whole(), tmp_path / "a", "model_best.pth") == []


def test_out_of_memory_is_one_line_with_the_flag_that_helps_and_the_checkpoint_stays(tmp_path):
    flags = [*FLAGS, "--total-steps", "9", "--test-freq", "2", "--save-path", tmp_path / "a"]
    code, _, error = run(tmp_path, flags, no_memory_after_a_save)
    assert one_line(code, 1, error, "out of memory with --batch-size 8: lower it", "checkpoint.pth of step 2 is intact") is None
    assert run(tmp_path, [*flags, "--resume"])[0] == 0


def no_memory_after_a_save():
    import metasemi
    from utils import checkpoint

    save, step, bytes_wanted = checkpoint.save, metasemi.training_step, [1]

    def greedy(*args, **options):
        torch.empty(bytes_wanted[0], dtype=torch.uint8)
        return step(*args, **options)

    def saving(*args):
        save(*args)
        bytes_wanted[0] = 2 ** 46           # more than there is anywhere
    metasemi.training_step, checkpoint.save = greedy, saving


def test_a_run_goes_on_when_its_terminal_is_gone(tmp_path):
    terminal, process_side = pty.openpty()
    process = start([*SHORT, "--save-path", tmp_path / "a"], partial(on_terminal, os.ttyname(process_side), 1, 2))
    os.read(terminal, 1)
    os.close(process_side), os.close(terminal)
    assert finish(process) == 0
    assert (tmp_path / "a" / "results.json").exists()


def test_a_resume_says_what_changed_and_that_equality_ends(train, tmp_path):
    train("a", "--total-steps", "3")
    path = tmp_path / "a" / "checkpoint.pth"
    saved = torch.load(path, weights_only=True)
    saved["sessions"][0] |= {"torch": "1.0", "threads": 77}
    torch.save(saved, path)
    train("a", "--resume")
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "resumed at step 3 from checkpoint.pth, the newest generation" in log
    assert f"torch was 1.0 and is {torch.__version__}: equal to the first part only up to rounding" in log
    assert log.count("was 77 and is") == 1 and log.count("up to rounding") == 2


def test_the_batch_script_of_the_documents_trains_and_asks_for_a_requeue(tmp_path):
    text = (ROOT / "docs" / "runs.md").read_text()
    script = next(block for block in re.findall(r"((?:^    .*\n|^\n)+)", text, re.MULTILINE) if "#SBATCH" in block)
    (tmp_path / "job.sh").write_text(textwrap.dedent(script))
    digits = "--dataset digits --num-label 50 -a convsmall --batch-size 8 --total-steps 100000 --test-freq 5 --device cpu"
    stubs = {"srun": f'#!/bin/sh\nexec "$@" {digits}\n', "scontrol": '#!/bin/sh\necho "$@" > requeued\n',
             "python3": f'#!/bin/sh\nexec {sys.executable} "$@"\n'}
    (tmp_path / "bin").mkdir()
    for name, content in stubs.items():
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train_meta.py").symlink_to(ROOT / "train_meta.py")
    reached = []
    for _ in range(2):
        job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL,
                               env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"})
        saved = next((tmp_path / "results").glob("*/checkpoint.pth"), None)
        before, deadline = saved and saved.stat().st_mtime_ns, time.monotonic() + 600
        while time.monotonic() < deadline:
            saved = next((tmp_path / "results").glob("*/checkpoint.pth"), None)
            if saved and saved.stat().st_mtime_ns != before:
                break
            time.sleep(0.05)
        for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGUSR1)         # the scheduler sends it to the step, not to the script
        assert job.wait(600) == 0
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"
        (tmp_path / "requeued").unlink()
        reached.append(torch.load(saved, weights_only=True)["step"])
    assert reached[0] < reached[1]


def test_a_checkpoint_that_cannot_be_read_is_refused_with_the_name_of_one_that_can(train, whole, tmp_path, capsys):
    shutil.copytree(whole(), tmp_path / "a")
    folder = tmp_path / "a"
    (folder / "checkpoint.pth").unlink()
    (folder / "checkpoint.pth").write_bytes(b"damaged")
    step = torch.load(folder / "checkpoint.prev.pth", weights_only=True)["step"]
    for main, flags in ((train_meta.main, ["--evaluate"]),
                        (plot_features.main, ["--save-path", str(tmp_path), "--checkpoint-path"])):
        with pytest.raises(SystemExit):
            main([*flags, str(folder / "checkpoint.pth")])
        assert f"checkpoint.prev.pth of step {step} is intact" in capsys.readouterr().err
    (folder / "checkpoint.prev.pth").unlink()
    (folder / "checkpoint.prev.pth").write_bytes(b"damaged")
    step = torch.load(folder / "model_best.pth", weights_only=True)["step"]
    assert train("a", "--resume") == 2
    assert f"{folder / 'model_best.pth'} of step {step} is intact" in capsys.readouterr().err
    assert checkpoint.describe_last(folder).endswith(f"{folder / 'model_best.pth'} of step {step} is intact")
    assert train("a", "--resume", str(folder / "model_best.pth")) == 0


@pytest.mark.parametrize("number", REPEATED)
def test_a_signal_that_comes_twice_by_itself_does_not_end_a_run_while_it_saves(number, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)         # under nohup this process ignores SIGHUP
    with Interrupt() as interrupt:
        interrupt.listen(), interrupt.defer()
        for _ in range(3):
            signal.raise_signal(number)
        assert interrupt.received == number and exit_code(number) == 143


def test_under_nohup_a_closed_terminal_does_not_stop_a_run():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            interrupt.listen()
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_names_from_files_reach_terminal_and_log_without_control_characters(train, tmp_path, capsys):
    name, shown = "cat\x1b[2J\n2026-01-01  step 9", r"cat\x1b[2J\n2026-01-01  step 9"
    images = make_folder(tmp_path / "images", (name, "dog"))
    flags = ["--dataset", "folder", "--data-path", str(images), "--image-size", "16", "--num-workers", "0", "--num-label", "4"]
    for i in range(4):
        (images / "train" / name / f"0{i}.png").write_bytes(b"damaged")
    assert train("a", *flags) == 2
    error = capsys.readouterr().err
    assert r"cat\x1b[2J" in error and "\x1b" not in error and error.count("\n") == 1
    assert train("a", *flags, "--skip-corrupt", "--no-meta", "--total-steps", "1") == 0
    log = (tmp_path / "a" / "log.txt").read_text()
    assert shown in log and "\x1b" not in log and "\n2026-01-01  step 9" not in log
    for i in range(4):
        shutil.copy(images / "train" / name / "05.png", images / "train" / name / f"0{i}.png")
    capsys.readouterr()
    assert train_meta.main(["--evaluate", str(tmp_path / "a" / "checkpoint.pth"), "--num-workers", "0"]) == 0
    out = capsys.readouterr().out
    assert f"\n{shown} " in out and "\x1b" not in out


state = st.deferred(lambda: st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.integers(0, 3).map(torch.zeros),
    st.lists(state, max_size=2), st.dictionaries(st.text(max_size=5), state, max_size=2)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    assert run(folder, [*FLAGS, "--total-steps", "1", "--save-path", folder / "run"])[0] == 0
    return folder / "run"


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(sorted(SCHEMA)), st.booleans(), state), min_size=1, max_size=2))
def test_a_checkpoint_of_any_content_is_read_or_refused_in_one_line(saved, changes):
    from train_meta import main

    content = torch.load(saved / "checkpoint.pth", weights_only=True)
    for key, inside, value in changes:
        if inside and isinstance(content[key], dict) and content[key]:
            content[key][next(iter(content[key]))] = value
        else:
            content[key] = value
    path = saved / "changed.pth"
    torch.save(content, path)
    try:
        loaded = checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    other = ["--total-steps", "2", "--save-path", str(saved.parent / "other"), "--overwrite"]
    for flags in ([*FLAGS, *other, "--resume", str(path)], ["--evaluate", str(path)]):
        try:
            code = main(flags)
        except SystemExit as error:
            code = error.code
        assert code in (0, 2), loaded


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=60), st.text(alphabet="0123456789\n -x²", max_size=60).map(str.encode)),
       st.one_of(st.none(), st.binary(max_size=60), st.text(alphabet='{}[]"sha256:,0 n', max_size=60).map(str.encode)))
def test_a_split_file_of_any_content_is_a_list_of_indices_or_refused_in_one_line(tmp_path, indices, split):
    (tmp_path / "label_indices.txt").write_bytes(indices)
    if split is None:
        (tmp_path / "split.json").unlink(missing_ok=True)
    else:
        (tmp_path / "split.json").write_bytes(split)
    try:
        labeled = read_split(tmp_path / "label_indices.txt")
    except UsageError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
        return
    assert split is None and list(map(int, indices.decode().split())) == labeled
    assert len(set(labeled)) == len(labeled) and min(labeled, default=0) >= 0


options = [*training_parser()._option_string_actions, *plotting_parser()._option_string_actions]
words = st.one_of(st.sampled_from(sorted(set(options))), st.text(max_size=8),
                  st.sampled_from(["1", "0", "-1", "nan", "inf", "1e3", "digits", "cifar10", "convsmall", "[1, 2]", "="]))


@settings(max_examples=300)
@given(st.lists(words, max_size=6), st.booleans())
def test_any_command_line_is_resolved_or_refused_in_one_line(capsys, line, training):
    try:
        args = resolve_flags(line)[0] if training else parse_plotting(line)
    except SystemExit as error:
        out = capsys.readouterr()
        assert error.code == 2 and out.err.count("\n") == 1 or error.code == 0 and "usage" in out.out
        return
    numbers = [value for value in vars(args).values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in numbers)


def test_text_from_a_file_is_shown_as_one_line_without_control_characters():
    assert printable("a\x1b[2J\nb\r\udcff\u202e") == r"a\x1b[2J\nb\r\udcff\u202e"
    assert printable(Path("ünï ☃/100 % $HOME")) == "ünï ☃/100 % $HOME"


def test_folders_and_files_whose_names_are_no_unicode_are_trained_on_resumed_evaluated_and_plotted(train, tmp_path, capsys):
    classes = [os.fsdecode(name) for name in (b"caf\xe9", b"na\xefve")]                # Latin-1
    images, folder, table = few_images(tmp_path / "im\udce4ges", classes=classes), "r\udcfcn", tmp_path / "p\udcff.csv"
    (images / "test" / classes[0] / "0.bmp").rename(images / "test" / classes[0] / "\udce9.bmp")
    flags, path = [*FEW, "--no-meta", "--data-path", str(images), "--total-steps"], str(tmp_path / folder / "checkpoint.pth")
    assert train("whole", *flags, "2") == 0
    assert train(folder, *flags, "1") == 0
    assert train(folder, *flags, "2", "--resume", path) == 0
    assert differing(tmp_path / "whole", tmp_path / folder) == []
    assert train_meta.main(["--evaluate", path, "--num-workers", "0", "--predictions", str(table)]) == 0
    rows = table.read_bytes().splitlines()
    assert len(rows) == 9 and os.fsencode(images / "test" / classes[0] / "\udce9.bmp") in b"".join(rows)
    assert [row.split(b",")[5] for row in rows[1:]] == [b"caf\xe9"] * 4 + [b"na\xefve"] * 4
    plot = ["--save-path", str(tmp_path / "figur\udce9"), "--num-workers", "0"]
    assert plot_features.main([*plot, "--checkpoint-path", path, "--method", "pca"]) == 0
    assert plot_features.main([*plot[:2], "--curves", str(tmp_path / folder)]) == 0
    summary = json.loads((tmp_path / "figur\udce9" / "embedding.json").read_text())
    assert summary["rows"][0]["label"] == r"r\udcfcn" and summary["rows"][0]["checkpoint"] == path
    out, error = capsys.readouterr()
    assert error == "" and r"caf\udce9" in out and r"r\udcfcn, test: 5-nearest" in out
    for main, command in ((train_meta.main, ["--evaluate", f"{path}x"]),
                          (plot_features.main, [*plot, "--checkpoint-path", f"{path}x"])):
        with pytest.raises(SystemExit, match="2"):
            main(command)
        assert r"r\udcfcn/checkpoint.pthx does not exist" in capsys.readouterr().err
