"""Whole runs of train_meta.py, a few steps each."""
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import termios
import time
from functools import partial

import pytest
import torch
from conftest import SHORT
from helpers import FEW, differing, few_images, finish, on_terminal, one_line, records, run, start, tensors, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_datasets import make_folder

import metasemi
import train_meta
import utils.device
import utils.metrics
import utils.state
from utils import checkpoint
from utils.metrics import error_rates

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
    for place, call, seconds in ((metasemi, metasemi.training_step, 1), (utils.metrics, utils.metrics.evaluate, 50),
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


@pytest.mark.parametrize(("row", "stops"), [("both", [1]), ("both", [3, 5]), ("neither", [4]), ("meta", [6]), ("mix-up", [3])])
def test_interrupted_and_resumed_training_equals_uninterrupted_training_bit_for_bit(train, whole, tmp_path, row, stops):
    for step in [*stops, 7]:
        assert train("parts", *ROWS[row], "--total-steps", str(step), "--resume") == 0
    assert differing(whole(*ROWS[row]), tmp_path / "parts") == []
    steps = [line["step"] for line in records(tmp_path / "parts")]
    assert steps == sorted(steps)


def test_a_killed_evaluation_is_made_up_for_on_resume(train, whole, tmp_path, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(utils.metrics, "evaluate", interrupted)
    assert train("parts", "--total-steps", "3") == 143
    monkeypatch.undo()
    train("parts", "--resume")
    assert [line for line in records(tmp_path / "parts") if "test/accuracy" in line] == \
           [line for line in records(whole()) if "test/accuracy" in line]
    assert differing(whole(), tmp_path / "parts") == []


def test_a_checkpoint_of_another_folder_continues_in_a_new_one(train, whole, tmp_path):
    train("a", "--mix-up", "--total-steps", "3")
    before = (tmp_path / "a" / "checkpoint.pth").read_bytes()
    assert train("b", "--mix-up", "--resume", str(tmp_path / "a" / "checkpoint.pth")) == 0
    assert differing(whole("--mix-up"), tmp_path / "b") == []
    assert (tmp_path / "b" / "label_indices.txt").read_text() == (tmp_path / "a" / "label_indices.txt").read_text()
    assert (tmp_path / "a" / "checkpoint.pth").read_bytes() == before
    train("d", "--seed", "3", "--total-steps", "2")
    assert train("d", "--mix-up", "--overwrite", "--resume", str(tmp_path / "a" / "checkpoint.pth")) == 0
    assert records(tmp_path / "d") == records(tmp_path / "b")                   # nothing of the run that was there
    assert train("c", "--mix-up", "--total-steps", "2", "--resume", str(tmp_path / "a" / "checkpoint.pth")) == 2
    assert not (tmp_path / "c").exists()                                        # already past its last step


def vanishing_labeled_images(images, away):
    """From disk; they vanish once the run has measured its test images, for the first and last time."""
    evaluate, calls = utils.metrics.evaluate, []
    utils.state.memory_for_images = lambda device: 0

    def vanish(*args, **options):
        calls.append(None)
        if len(calls) == 2:
            images.rename(away)
        return evaluate(*args, **options)
    utils.metrics.evaluate = vanish


def test_an_image_that_vanishes_in_the_last_measurement_of_all_is_one_line_and_a_resume_finishes(tmp_path):
    images = few_images(tmp_path / "images") / "train" / "ant"
    flags = [*SHORT, *FEW, "--data-path", tmp_path / "images", "--total-steps", "2", "--save-path", tmp_path / "a"]
    code, _, error = run(tmp_path, flags, partial(vanishing_labeled_images, images, tmp_path / "away"))
    assert one_line(code, 1, error, f"{images}/", "No such file", "; step 2 is saved, and --resume continues") is None
    assert not (tmp_path / "a" / "results.json").exists()
    (tmp_path / "away").rename(images)
    assert run(tmp_path, [*flags, "--resume"])[0] == 0 and (tmp_path / "a" / "results.json").exists()


def test_results_that_a_kill_kept_from_being_written_are_written_on_resume(train, tmp_path):
    train("a")
    results = (tmp_path / "a" / "results.json").read_text()
    (tmp_path / "a" / "results.json").unlink()
    assert train("a", "--resume") == 0
    assert json.loads((tmp_path / "a" / "results.json").read_text())["error_rate"] == json.loads(results)["error_rate"]


def test_a_folder_that_cannot_be_made_is_one_line_and_a_fault_of_the_machine(train, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train("file/a") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_resume_in_a_folder_without_a_checkpoint_starts_the_run(train, whole, tmp_path):
    train("a")
    for name in ("checkpoint.pth", "checkpoint.prev.pth", "model_best.pth", "results.json"):
        (tmp_path / "a" / name).unlink()                                        # as if killed before the first save
    metrics = tmp_path / "a" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    assert train("a", "--resume") == 0
    assert differing(whole(), tmp_path / "a") == []
    assert [line["step"] for line in records(tmp_path / "a")] == [2, 3, 4, 6, 6, 7, 7]


def test_a_terminal_shows_a_progress_bar_and_the_log_file_never(tmp_path):
    terminal, process_side = pty.openpty()
    termios.tcsetwinsize(process_side, (24, 80))
    process = start([*SHORT, "--no-meta", "--save-path", tmp_path / "a"], partial(on_terminal, os.ttyname(process_side), 2),
                    output=tmp_path / "output")
    wait_for(tmp_path / "output.out", "parameters", process)            # it has the terminal open, too
    os.close(process_side)
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:                                                             # the other side was closed
        pass
    assert finish(process) == 0
    assert b"7/7" in shown and b"\r" in shown
    log = (tmp_path / "a" / "log.txt").read_bytes()
    assert b"\r" not in log and b"step/s" not in log


def test_records_after_the_checkpoint_are_removed_on_resume(train, tmp_path):
    train("a", "--total-steps", "3")
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train/loss": 1.0}\n{"step": 5, "tra')
    train("a", "--resume")
    assert [line["step"] for line in records(tmp_path / "a")] == [2, 3, 3, 4, 6, 6, 7, 7]


def test_the_command_that_users_know_runs_as_it_stands(command, tmp_path):
    flags = ["--dataset", "digits", "--num-label", "50", "-a", "convlarge", "--mix-up", "--alpha", "1.0",
             "--save-path", tmp_path / "run", "--weight", "1.0", "--total-steps", "1", "--milestones", "[300000, 350000]",
             "--lr", "0.1", "--seed", "7788", "--warmup", "4000", "--weight-decay", "1e-4", "--batch-size", "8"]
    done = subprocess.run(command("train_meta.py", *flags), env={"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "convlarge, 3,121,802 parameters" in done.stdout and "finished 1 steps" in done.stdout


@pytest.mark.parametrize("flags", [
    ["--meta-gradient", "finite-difference"], ["--meta-gradient", "unrolled", "--consistency", "kl"],
    ["--mix-up", "--precision", "bfloat16"], ["--meta-lr", "0"], ["--include-labeled"], ["--warmup", "0"],
    ["--num-label", "1297", "--no-meta"], ["--num-label", "1297", "--include-labeled", "--mix-up"]])
def test_every_choice_trains_to_finite_weights(train, tmp_path, flags):
    assert train("a", *flags) == 0
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
    rates = json.loads((tmp_path / "a" / "results.json").read_text())["error_rate"]
    assert rates["best_validation"] == pytest.approx(100 * (1 - best["test/accuracy"]), abs=1e-3)


def damage(root):
    (root / "train" / "ant" / "0.bmp").write_bytes(b"no image")


@pytest.mark.parametrize(("change", "flags", "message"), [
    (lambda root: shutil.rmtree(root) or few_images(root, seed=1), [], "the training pixels, test pixels differ"),
    (lambda root: shutil.rmtree(root) or few_images(root, classes=("ant", "wasp")), [],
     "the class names, names of training files, names of test files differ"),
    (lambda root: (root / "train/ant/0.bmp").rename(root / "train/ant/z.bmp"), [], "names of training files, training pixels"),
    (lambda root: (root / "test/ant/0.bmp").unlink(), ["--skip-corrupt"], "the test labels, names of test files differ"),
    (lambda root: root.rename(root.with_name("b")), [], None),
    (damage, ["--skip-corrupt"], None)])
def test_a_resume_takes_the_same_data_wherever_they_lie_and_names_what_differs(few, train, tmp_path, capsys, change, flags,
                                                                               message):
    shutil.copytree(few / "images", tmp_path / "images"), shutil.copytree(few / "run", tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.name != ".lock"}
    change(tmp_path / "images")
    root = next(path for path in tmp_path.iterdir() if (path / "test").exists())
    assert train("a", *FEW, "--data-path", str(root), "--resume", *flags) == (2 if message else 0)
    if message:
        assert message in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.name != ".lock"} == before
    elif not flags:
        assert differing(few / "whole", tmp_path / "a") == []


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A run on few images that stopped at step 3, and the whole of it."""
    root = tmp_path_factory.mktemp("few")
    flags = [*SHORT, *FEW, "--data-path", str(few_images(root / "images"))]
    assert train_meta.main([*flags, "--save-path", str(root / "whole")]) == 0
    assert train_meta.main([*flags, "--save-path", str(root / "run"), "--total-steps", "3"]) == 0
    return root


def test_a_checkpoint_without_a_digest_of_its_data_resumes_and_says_so(few, train, tmp_path, capsys):
    shutil.copytree(few / "run", tmp_path / "a")
    saved = torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)
    del saved["data"]
    torch.save(saved, tmp_path / "a" / "checkpoint.pth")
    flags = [*FEW, "--data-path", str(few / "images"), "--resume"]
    assert train("a", *flags) == 0 and differing(few / "whole", tmp_path / "a") == []
    assert "which kept no digest of its images: they could not be compared" in (tmp_path / "a" / "log.txt").read_text()
    saved["class_names"] = ["bee", "ant"]
    torch.save(saved, tmp_path / "a" / "checkpoint.pth")
    capsys.readouterr()
    assert train("a", *flags) == 2 and "the class names differ" in capsys.readouterr().err


def test_best_accuracy_survives_a_resume(train, tmp_path):
    train("a", "--total-steps", "3")
    path = tmp_path / "a" / "checkpoint.pth"
    saved = torch.load(path, weights_only=True)
    saved["evaluations"][0]["test"] = saved["best"] = 1.0                       # nothing later can be better
    torch.save(saved, path)
    best = (tmp_path / "a" / "model_best.pth").read_bytes()
    assert train("a", "--resume") == 0
    assert (tmp_path / "a" / "model_best.pth").read_bytes() == best
    assert json.loads((tmp_path / "a" / "results.json").read_text())["error_rate"]["best_test"] == 0.0


def test_a_finished_run_is_left_as_it_is_and_continues_with_more_steps(train, tmp_path, capsys):
    train("a")
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.name != ".lock"}
    assert train("a", "--resume") == 0
    assert "finished at step 7" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
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


def test_diverging_training_stops_with_one_line_and_never_saves_what_is_not_finite(train, tmp_path, capsys):
    train("a", "--total-steps", "3")
    saved = torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)
    saved["model"]["classifier.weight"][:] = 3e38
    torch.save(saved, tmp_path / "a" / "checkpoint.pth")
    previous = (tmp_path / "a" / "checkpoint.pth").read_bytes()
    assert train("a", "--resume") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not finite at step 4, whose update was left out" in error
    assert (tmp_path / "a" / "checkpoint.pth").read_bytes() == previous
    assert train("b", "--no-meta", "--lr", "1e30", "--warmup", "0") == 1
    assert "not finite at step 2, whose update was left out; the last finite loss was" in capsys.readouterr().err
    assert not (tmp_path / "b" / "checkpoint.pth").exists()
