"""What a run survives: the short forms of the injections, and what they do not reach."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import FEW, differing, few_images, one_line, state_of
from injections import INJECTIONS
from test_datasets import make_folder

import metasemi
import plot_features
import train_meta
from utils import checkpoint
from utils.errors import printable
from utils.interrupt import Interrupt


def lost(name, folder, tries, patch=None):
    return [fault for fault in INJECTIONS[name].inject(folder, tries, np.random.default_rng(0), patch) if fault]


@pytest.mark.parametrize("name", INJECTIONS)
def test_nothing_is_lost(tmp_path, name):
    assert lost(name, tmp_path, INJECTIONS[name].short) == []


@pytest.mark.parametrize("name", INJECTIONS)
def test_without_its_protection_something_is_lost(tmp_path, name):
    assert lost(name, tmp_path, INJECTIONS[name].short, INJECTIONS[name].without) != []


def test_out_of_memory_is_one_line_with_the_flag_that_helps_and_the_checkpoint_stays(train, tmp_path, monkeypatch, capsys):
    step, path = metasemi.training_step, tmp_path / "a" / "checkpoint.pth"

    def greedy(*args, **options):
        torch.empty(2 ** 46 if path.exists() else 1, dtype=torch.uint8)         # more than there is anywhere
        return step(*args, **options)

    monkeypatch.setattr(metasemi, "training_step", greedy)
    assert train("a") == 1
    error = capsys.readouterr().err
    assert one_line(1, 1, error, "out of memory with --batch-size 8: lower it", f"{path} of step 3 is intact") is None
    monkeypatch.undo()
    assert train("a", "--resume") == 0


def test_a_resume_says_what_changed_and_that_equality_ends(train, tmp_path):
    train("a", "--total-steps", "3")
    path = tmp_path / "a" / "checkpoint.pth"
    saved = torch.load(path, weights_only=True)
    saved["sessions"][0] |= {"torch": "1.0", "threads": 77}
    torch.save(saved, path)
    train("a", "--resume")
    log = (tmp_path / "a" / "log.txt").read_text()
    assert f"resumed at step 3 from {path}" in log
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
    reached, results = [], tmp_path / "results"

    def saves():
        return [path.stat().st_mtime_ns for path in results.glob("*/checkpoint.pth")]

    for _ in range(2):
        job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL,
                               env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"})
        before, deadline = saves(), time.monotonic() + 600
        while saves() == before and time.monotonic() < deadline:
            time.sleep(0.05)
        for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGUSR1)         # the scheduler sends it to the step, not to the script
        assert job.wait(600) == 0
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"
        (tmp_path / "requeued").unlink()
        reached.append(state_of(*results.iterdir())["step"])
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
    assert checkpoint.describe_last(folder) == f"{folder / 'model_best.pth'} of step {step} is intact"
    assert train("a", "--resume", str(folder / "model_best.pth")) == 0
    names = ("checkpoint.pth", "checkpoint.prev.pth", "model_best.pth")
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(b"damaged")
    assert checkpoint.describe_last(folder) == "no checkpoint is intact"
    for name in names:
        (folder / name).unlink()
    assert checkpoint.describe_last(folder) == "no checkpoint was saved before"


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
    name = "cat\x1b[2J\n2026-01-01  step 9"
    images = make_folder(tmp_path / "images", (name, "dog"))
    flags = ["--dataset", "folder", "--data-path", str(images), "--image-size", "16", "--num-workers", "0", "--num-label", "4"]
    (images / "train" / name / "00.png").write_bytes(b"damaged")
    assert train("a", *flags) == 2
    error = capsys.readouterr().err
    assert r"cat\x1b[2J" in error and error[:-1].isprintable()
    assert train("a", *flags, "--skip-corrupt", "--no-meta", "--total-steps", "1") == 0
    log = (tmp_path / "a" / "log.txt").read_text()
    assert r"cat\x1b[2J" in log and "\x1b" not in log and "\n2026-01-01  step 9" not in log


@pytest.mark.parametrize(("change", "words"), [
    (lambda saved: saved.pop("rng"), "rng"), (lambda saved: saved.update(step="3"), "step"),
    (lambda saved: saved.update(labeled=[1, 2]), "labeled"), (lambda saved: saved["args"].update(image_size=10 ** 9), "1024"),
    (lambda saved: saved["args"].update(arch="\x1b[2J\nstep 1/1  test error 0.00 %"), "arch"),
    (lambda saved: saved.pop("version"), "is not a checkpoint of train_meta.py, version 2: one of another")])
def test_a_checkpoint_that_no_run_has_left_is_refused_in_one_line(train, whole, tmp_path, capsys, change, words):
    path, saved = tmp_path / "x.pth", state_of(whole())
    change(saved)
    torch.save(saved, path)
    assert train("a", "--resume", str(path)) == 2
    error = capsys.readouterr().err
    assert str(path) in error and words in error and error.endswith("\n") and error[:-1].isprintable()
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_others_in_a_run_folder_stay_and_one_in_the_place_of_a_runs_own_is_refused(train, tmp_path, capsys):
    flags = ["--no-meta", "--total-steps", "1", "--overwrite"]
    assert train("a", *flags) == 0
    foreign = [tmp_path / "linked", *(tmp_path / "a" / name for name in ("notes.tmp", "events.out.tfevents.1.other"))]
    for path in foreign:
        path.write_text("foreign")
    for name in ("args.json.tmp", "checkpoint.pth.tmp"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "linked")
    assert train("a", *flags) == 0
    assert {path.read_text() for path in foreign} == {"foreign"}
    assert {path.name for path in (tmp_path / "a").glob("*.tmp")} == {"notes.tmp"}
    assert len(list((tmp_path / "a").glob("*tfevents*"))) == 2
    for name, make in (("b", Path.touch), ("c", os.mkfifo)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "split.json")
        capsys.readouterr()
        assert train(name, *flags) == 2
        assert f"{tmp_path / name / 'split.json'} is not a regular file of a run" in capsys.readouterr().err
        assert {path.name for path in (tmp_path / name).iterdir()} <= {"split.json", ".lock"}


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
