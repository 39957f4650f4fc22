"""Whole runs of train_meta.py, a few steps each."""
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import termios
import time
from functools import partial

import pytest
import torch
from conftest import SHORT
from helpers import FEW, contents, differing, few_images, finish, on_terminal, records, run, start, tensors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_datasets import make_folder

import metasemi
import utils.evaluation
import utils.setup
from utils import checkpoint
from utils.meters import error_rates

ROWS = {"neither": ["--no-meta"], "meta": [], "mix-up": ["--no-meta", "--mix-up"], "both": ["--mix-up"]}
TAGS = {
    "neither": {"label-acc", "label-loss"},
    "meta": {"label-acc", "label-loss", "unlabel-acc", "unlabel-loss"},
    "mix-up": {"interp-loss", "unlabel-acc"},
    "both": {"label-acc", "label-loss", "unlabel-acc", "unlabel-loss", "interp-loss"},
}


@pytest.mark.parametrize("row", ROWS)
def test_a_run_leaves_every_record_under_the_official_tags(whole, row):
    folder = whole(*ROWS[row])
    lines = records(folder)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6, 7, 7]
    logged = {tag for line in lines for tag in line}
    assert {f"train/{name}" for name in TAGS[row] | {"lr", "loss"}} | {"test/accuracy"} <= logged
    assert ("train/pseudo-acc" in logged) == (row in ("meta", "both"))

    events = EventAccumulator(str(folder))
    events.Reload()
    for tag in logged - {"step"}:
        expected = [(line["step"], line[tag]) for line in lines if tag in line]
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(step, pytest.approx(v)) for step, v in expected]

    indices = [int(line) for line in (folder / "label_indices.txt").read_text().splitlines()]
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert saved["labeled"].tolist() == indices and saved["step"] == 7
    assert len(json.loads((folder / "split.json").read_text())["sha256"]) == 64
    arguments = json.loads((folder / "args.json").read_text())
    assert arguments["args"]["num_label"] == 50 and arguments["sessions"][0]["torch"] == torch.__version__
    log = (folder / "log.txt").read_text()
    assert "step 6/7" in log and "images/s" in log and "left" in log and "\r" not in log
    rates = json.loads((folder / "results.json").read_text())["error_rate"]
    assert rates["last"] == pytest.approx(100 * (1 - lines[-1]["test/accuracy"]))
    assert rates["best_test"] == pytest.approx(100 * (1 - max(line.get("test/accuracy", 0) for line in lines)))
    best = torch.load(folder / "model_best.pth", weights_only=True)
    assert 100 * (1 - best["evaluations"][-1]["test"]) == pytest.approx(rates["best_test"])


def test_the_speed_is_that_of_training_alone_and_the_time_left_has_room_for_evaluations(train, monkeypatch, capsys):
    """A step takes 1 s, an evaluation 50 s and a save 10 s, by a clock that only they move."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for place, call, seconds in ((metasemi, metasemi.training_step, 1), (utils.evaluation, utils.evaluation.evaluate, 50),
                                 (checkpoint, checkpoint.save, 10)):
        def slow(*args, call=call, seconds=seconds, **options):
            now[0] += seconds
            return call(*args, **options)
        monkeypatch.setattr(place, call.__name__, slow)
    assert train("a", "--print-freq", "1", "--test-freq", "2") == 0
    out = capsys.readouterr().out
    assert re.findall(r"(\d+) images/s  (.*) left", out) == [("16", left) for left in (
        "6 s", "5 s", "2 min 04 s", "1 min 33 s", "1 min 02 s", "31 s", "0 s")]
    assert "finished 7 steps in 3 min 57 s" in out                  # what the run took: all but the last save


def test_every_selection_rule_is_reported_side_by_side():
    evaluations = [{"step": s, "test": t, "validation": v} for s, t, v in ((1, 0.5, 0.9), (2, 0.8, 0.7), (3, 0.7, 0.6))]
    assert error_rates(evaluations) == {"last": 30.0, "median_last_20": 30.0, "best_validation": 50.0, "best_test": 20.0}
    many = [{"step": s, "test": 0.0} for s in range(5)] + [{"step": s, "test": 0.9} for s in range(20)]
    assert error_rates(many) == {"last": 10.0, "median_last_20": 10.0, "best_validation": None, "best_test": 10.0}


def test_a_killed_evaluation_is_made_up_for_on_resume(train, whole, tmp_path, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(utils.evaluation, "evaluate", interrupted)
    assert train("parts", "--total-steps", "3") == 143
    monkeypatch.undo()
    train("parts", "--resume")
    assert [line for line in records(tmp_path / "parts") if "test/accuracy" in line] == \
           [line for line in records(whole()) if "test/accuracy" in line]
    assert differing(whole(), tmp_path / "parts") == []


def test_a_checkpoint_of_another_folder_continues_in_a_new_one(train, whole, tmp_path):
    train("a", "--mix-up", "--total-steps", "3")
    before, flags = contents(tmp_path / "a"), ["--mix-up", "--resume", str(tmp_path / "a" / "checkpoint.pth")]
    assert train("b", *flags) == 0
    assert differing(whole("--mix-up"), tmp_path / "b") == []
    assert (tmp_path / "b" / "label_indices.txt").read_text() == (tmp_path / "a" / "label_indices.txt").read_text()
    assert contents(tmp_path / "a") == before
    train("d", "--seed", "3", "--total-steps", "2")
    assert train("d", *flags, "--overwrite") == 0
    assert records(tmp_path / "d") == records(tmp_path / "b")                   # nothing of the run that was there
    assert train("c", *flags, "--total-steps", "2") == 2
    assert not (tmp_path / "c").exists()                                        # already past its last step


@pytest.mark.parametrize(("steps", "lost"), [
    ("3", ["model_best.pth"]), ("7", ["results.json"]), ("3", ["model_best.pth", "results.json", "checkpoint.pth"])])
def test_what_a_kill_kept_from_being_written_is_made_up_for_on_resume(train, whole, tmp_path, steps, lost):
    train("a", "--total-steps", steps)
    for name in lost:
        (tmp_path / "a" / name).unlink()
    assert train("a", "--resume") == 0
    for name in ("checkpoint.pth", "model_best.pth"):
        assert differing(whole(), tmp_path / "a", name) == []
    assert [line["step"] for line in records(tmp_path / "a") if "test/accuracy" in line] == [3, 6, 7]
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "a", whole()))
    assert ours["error_rate"] == theirs["error_rate"]


def test_a_folder_that_cannot_be_made_is_one_line_and_a_fault_of_the_machine(train, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train("file/a") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_terminal_shows_a_progress_bar_the_log_file_never_and_a_run_goes_on_when_the_terminal_is_gone(tmp_path):
    terminal, process_side = pty.openpty()
    fcntl.ioctl(process_side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = start([*SHORT, "--no-meta", "--total-steps", "60", "--save-path", tmp_path / "a"],
                    partial(on_terminal, os.ttyname(process_side), 1, 2))
    shown = os.read(terminal, 4096)
    os.close(process_side)              # the process has it open, too, by now
    while not (b"step/s" in shown and b"step 6/60" in shown):
        shown += os.read(terminal, 4096)
    os.close(terminal)
    assert finish(process) == 0
    log = (tmp_path / "a" / "log.txt").read_bytes()
    assert b"finished 60 steps" in log and b"\r" not in log and b"step/s" not in log


def test_the_command_that_users_know_runs_as_it_stands(tmp_path):
    flags = ["--dataset", "digits", "--num-label", "50", "-a", "convlarge", "--mix-up", "--alpha", "1.0",
             "--save-path", tmp_path / "run", "--weight", "1.0", "--total-steps", "1", "--milestones", "[300000, 350000]",
             "--lr", "0.1", "--seed", "7788", "--warmup", "4000", "--weight-decay", "1e-4", "--batch-size", "8"]
    code, out, error = run(tmp_path, flags)
    assert (code, error) == (0, "")
    assert "convlarge, 3,121,802 parameters" in out and "finished 1 steps" in out


@pytest.mark.parametrize("flags", [
    ["--meta-gradient", "finite-difference", "--warmup", "0"], ["--meta-gradient", "unrolled", "--consistency", "kl"],
    ["--mix-up", "--precision", "bfloat16", "--meta-lr", "0"],
    ["--num-label", "1297", "--no-meta"], ["--num-label", "1297", "--include-labeled", "--mix-up"]])
def test_every_choice_trains_to_finite_weights(train, tmp_path, flags):
    assert train("a", *flags, "--total-steps", "3") == 0
    assert all(v.isfinite().all() for v in tensors(torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)).values())


def test_a_folder_of_images_trains_with_a_validation_set_that_selects_the_best_model(train, tmp_path):
    root = make_folder(tmp_path / "images", classes=("ant", "bee", "cow"), count=8)
    flags = ["--dataset", "folder", "--data-path", str(root), "--image-size", "16", "--flip", "--num-label", "6",
             "--num-val", "6", "--mix-up"]
    assert train("a", *flags) == 0
    saved = torch.load(tmp_path / "a" / "model_best.pth", weights_only=True)
    assert saved["class_names"] == ["ant", "bee", "cow"] and saved["image_size"] == 16
    assert saved["model"]["classifier.weight"].shape == (3, 16)
    validation = json.loads((tmp_path / "a" / "split.json").read_text())["validation"]
    assert len(validation) == 6 and not set(validation) & set(saved["labeled"].tolist())
    lines = [line for line in records(tmp_path / "a") if "validation/accuracy" in line]
    best = max(lines, key=lambda line: line["validation/accuracy"])
    assert saved["step"] == best["step"]


def test_what_a_run_left_out_as_corrupt_stays_left_out_when_it_is_resumed(train, tmp_path):
    root = few_images(tmp_path / "images")
    image = root / "train" / "ant" / "0.bmp"
    before = image.read_bytes()
    image.write_bytes(b"no image")
    flags = [*FEW, "--data-path", str(root), "--skip-corrupt"]
    assert train("whole", *flags) == train("a", *flags, "--total-steps", "3") == 0
    assert "left out: " in (tmp_path / "a" / "log.txt").read_text()
    image.write_bytes(before)
    assert train("a", *flags, "--resume") == 0
    assert differing(tmp_path / "whole", tmp_path / "a") == []
    assert torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)["left_out"] == ["train/ant/0.bmp"]


def test_best_accuracy_survives_a_resume(train, tmp_path):
    train("a", "--total-steps", "3")
    path = tmp_path / "a" / "checkpoint.pth"
    saved = torch.load(path, weights_only=True)
    saved["evaluations"][0]["test"] = 1.0                                       # nothing later can be better
    torch.save(saved, path)
    best = (tmp_path / "a" / "model_best.pth").read_bytes()
    assert train("a", "--resume") == 0
    assert (tmp_path / "a" / "model_best.pth").read_bytes() == best
    assert json.loads((tmp_path / "a" / "results.json").read_text())["error_rate"]["best_test"] == 0.0


def test_a_finished_run_is_left_as_it_is_and_continues_with_more_steps(train, whole, tmp_path, capsys):
    shutil.copytree(whole(), tmp_path / "a")
    before = contents(tmp_path / "a")
    assert train("a", "--resume") == 0
    assert "finished at step 7" in capsys.readouterr().out
    assert contents(tmp_path / "a") == before
    assert train("a", "--resume", "--total-steps", "9") == 0
    assert torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)["step"] == 9
    assert "resumed at step 7" in (tmp_path / "a" / "log.txt").read_text()


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_ends_up_the_same(train, whole, tmp_path, capsys):
    train("a", "--total-steps", "6")
    path = tmp_path / "a" / "checkpoint.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert train("a", "--resume") == 0
    assert "falling back to checkpoint.prev.pth" in capsys.readouterr().out
    assert "resumed at step 3" in (tmp_path / "a" / "log.txt").read_text()
    assert differing(whole(), tmp_path / "a") == []


def test_training_that_diverges_before_the_first_checkpoint_is_one_line_and_saves_nothing(train, tmp_path, capsys):
    assert train("a", "--no-meta", "--lr", "1e30", "--warmup", "0") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not finite at step 2, whose update was left out; the last finite loss was" in error
    assert not (tmp_path / "a" / "checkpoint.pth").exists()
