"""train_meta.py --evaluate: what it measures, prints and writes, and what it refuses."""
import csv
import re

import pytest
import torch
from helpers import FEW, Malicious, few_images, negative_variance, records, spoil
from oracle import close
from test_datasets import make_folder

import metasemi
import train_meta
from datasets import load_dataset
from datasets.decoding import decode_file
from models import build_model
from utils.evaluation import report
from utils.metrics import expected_calibration_error


def evaluate(*flags):
    try:
        return train_meta.main(["--evaluate", *map(str, flags)])
    except SystemExit as error:
        return error.code


@pytest.fixture
def run(whole):
    return whole("--mix-up")


def test_the_confusion_matrix_has_a_row_for_each_true_class_also_of_one_that_is_absent():
    labels, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 2, 2])
    lines = list(report(labels, predicted, torch.ones(6), ["a", "b", "c", "d"]))
    assert [line.split() for line in lines[-4:]] == [["a", "1", "1", "0", "0"], ["b", "0", "1", "0", "0"],
                                                     ["c", "1", "0", "2", "0"], ["d", "0", "0", "0", "0"]]


@pytest.mark.parametrize(("confidence", "correct", "bins", "expected"), [
    ([1.0, 1.0], [True, True], 15, 0.0),
    ([1.0, 1.0], [True, False], 15, 0.5),
    ([0.6, 0.7, 0.9], [True, False, False], 2, 2.2 / 3 - 1 / 3),        # one bin: |1/3 - mean confidence|
    ([0.5, 0.75], [True, False], 2, (0.5 + 0.75) / 2),                  # 1/2 ends the first bin: else the gaps would cancel
    ([0.25, 0.75, 0.75, 0.75], [False, True, True, False], 4, (0.25 + 0.25) / 4)])
def test_expected_calibration_error_by_hand(confidence, correct, bins, expected):
    value = expected_calibration_error(torch.tensor(confidence), torch.tensor(correct), bins)
    assert value == pytest.approx(expected, abs=4 * torch.finfo(torch.float32).eps)     # of confidences up to 1


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint.prev.pth"])
def test_the_accuracy_is_exactly_what_the_run_recorded_at_that_step(run, capsys, name):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()}
    assert evaluate(run / name) == 0
    out = capsys.readouterr().out
    step = torch.load(run / name, weights_only=True)["step"]
    recorded = [line["test/accuracy"] for line in records(run) if line["step"] == step and "test/accuracy" in line]
    right, count = map(int, re.search(r"\((\d+) of (\d+) are right\)", out).groups())
    assert [right / count] == recorded and count == 100
    assert f"of step {step}: convsmall on cpu, float32" in out and "test set of digits: 100 images, 10 classes" in out
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.iterdir()} == before


def test_everything_printed_and_written_follows_from_the_logits(run, tmp_path, capsys):
    assert evaluate(run / "checkpoint.pth", "--predictions", tmp_path / "p.csv") == 0
    out = capsys.readouterr().out
    images, saved = load_dataset("digits", "."), torch.load(run / "checkpoint.pth", weights_only=True)
    model = build_model("convsmall", 10).eval()
    model.load_state_dict(saved["model"])
    with torch.no_grad():
        p = model((images.test_images / 255 - saved["mean"].view(-1, 1, 1)) / saved["std"].view(-1, 1, 1)).softmax(dim=1)
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    predicted = torch.tensor([int(row["predicted"]) for row in rows])
    confidence = p.gather(1, predicted[:, None])[:, 0]
    assert close(confidence, p.max(dim=1).values)               # no other class is likelier, up to rounding
    assert [int(row["index"]) for row in rows] == list(range(100))
    assert [int(row["label"]) for row in rows] == images.test_labels.tolist()
    assert [float(row["confidence"]) for row in rows] == pytest.approx(confidence.tolist(), abs=1e-5)
    assert all(row["label_name"] == row["label"] and row["file"] == "" for row in rows)
    matrix = torch.bincount(10 * images.test_labels + predicted, minlength=100).view(10, 10)
    printed = [list(map(int, line.split())) for line in out.splitlines() if re.fullmatch(r"\d+( +\d+){10}", line)]
    assert printed == [[k, *row] for k, row in enumerate(matrix.tolist())]
    for k, row in enumerate(matrix):
        assert re.search(rf"^{k} +{row.sum()} +{100 * row[k] / row.sum():.2f} %$", out, re.MULTILINE)
    calibration = float(re.search(r"calibration error (\S+)", out)[1])
    assert calibration == pytest.approx(expected_calibration_error(confidence, predicted == images.test_labels), abs=1e-4)


def test_a_bare_state_dict_is_normalized_as_the_data_set_is_and_gives_the_same(run, tmp_path, capsys):
    weights = torch.load(run / "checkpoint.pth", weights_only=True)["model"]
    assert evaluate(run / "checkpoint.pth") == 0
    expected = capsys.readouterr().out.splitlines()[2:]
    for content in (weights, {"step": 7, "state_dict": weights, "best_acc": 0.5}):      # the second of another program
        torch.save(content, tmp_path / "weights.pth")
        assert evaluate(tmp_path / "weights.pth", "--dataset", "digits", "-a", "convsmall") == 0
        assert capsys.readouterr().out.splitlines()[2:] == expected


def test_a_folder_of_the_users_own_names_its_files_and_classes(train, tmp_path, capsys):
    root = make_folder(tmp_path / "images", classes=("ant", "bée, or not"), count=4)
    flags = ["--dataset", "folder", "--data-path", str(root), "--image-size", "16", "--num-label", "4"]
    assert train("a", *flags, "--precision", "bfloat16") == 0
    root = root.rename(tmp_path / "moved")
    capsys.readouterr()
    assert evaluate(tmp_path / "a" / "checkpoint.pth", "--data-path", root, "--predictions", tmp_path / "p.csv") == 0
    assert f"test set of folder under {root}: 8 images, 2 classes" in capsys.readouterr().out
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows[3:5]] == [str(root / "test/ant/03.png"), str(root / "test/bée, or not/00.png")]
    assert [row["label_name"] for row in rows] == ["ant"] * 4 + ["bée, or not"] * 4
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert [line["test/accuracy"] for line in records(tmp_path / "a") if "test/accuracy" in line][-1] == right / 8
    (root / "test" / "ant").rename(root / "test" / "asp"), (root / "train" / "ant").rename(root / "train" / "asp")
    assert evaluate(tmp_path / "a" / "checkpoint.pth", "--data-path", root) == 2
    assert "has other classes than" in capsys.readouterr().err


def test_images_without_classes_are_predicted_with_every_probability_and_no_accuracy(train, tmp_path, capsys):
    root = make_folder(tmp_path / "images", classes=("=ant", "bee, or not"), count=4)
    assert train("a", "--dataset", "folder", "--data-path", str(root), "--image-size", "16", "--num-label", "4") == 0
    heap = (root / "test").rename(tmp_path / "heap")
    (heap / "=ant" / "00.png").rename(heap / "flat.png"), (heap / "notes.txt").write_text("")
    files = [str(path) for path in sorted(heap.rglob("*.png"), key=str)]
    capsys.readouterr()
    command = [tmp_path / "a" / "checkpoint.pth", "--data-path", heap, "--num-workers", "0"]
    assert evaluate(*command, "--predictions", tmp_path / "p.csv") == 0
    out = capsys.readouterr().out
    assert f"{heap}: 8 images without a class" in out and "1 of another suffix ('notes.txt')" in out
    assert not re.search(r"accuracy \d|error|confusion|%", out)
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "predicted", "predicted_name", "'=ant", "bee, or not"]
    assert [row["file"] for row in rows] == files
    saved = torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)
    model = build_model("convsmall", 2).eval()
    model.load_state_dict(saved["model"])
    for row in rows:
        pixels = torch.from_numpy(decode_file(row["file"], 16).copy())[None]
        with torch.no_grad():
            p = model((pixels / 255 - saved["mean"].view(-1, 1, 1)) / saved["std"].view(-1, 1, 1)).softmax(dim=1)[0]
        assert [float(row["'=ant"]), float(row["bee, or not"])] == pytest.approx(p.tolist(), abs=1e-5)
        assert row["predicted_name"] == ("'=ant", "bee, or not")[int(row["predicted"])] and int(row["predicted"]) == p.argmax()
    assert evaluate(*command) == 2 and "heap/train is not a folder" in capsys.readouterr().err
    (heap / "flat.png").write_bytes(b"broken")
    assert evaluate(*command, "--predictions", tmp_path / "p.csv") == 2 and "flat.png cannot" in capsys.readouterr().err
    assert evaluate(*command, "--predictions", tmp_path / "p.csv", "--skip-corrupt") == 0
    assert "over 7 of 8 images" in capsys.readouterr().out and (tmp_path / "p.csv").read_text().count("\n") == 8
    (heap / "test").mkdir()
    assert evaluate(*command, "--predictions", tmp_path / "p.csv") == 2 and "heap/train is not" in capsys.readouterr().err


def test_a_checkpoint_of_another_data_set_predicts_a_folder_too(run, tmp_path, capsys):
    make_folder(tmp_path / "heap", count=1)
    assert evaluate(run / "checkpoint.pth", "--data-path", tmp_path / "heap", "--predictions", tmp_path / "p.csv") == 0
    assert "4 images without a class" in capsys.readouterr().out
    assert (tmp_path / "p.csv").read_text().splitlines()[0] == "file,predicted,predicted_name,0,1,2,3,4,5,6,7,8,9"


def test_a_name_is_no_formula_in_the_predictions_and_no_escape_sequence_on_the_terminal(train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ("=1+1", "@x", "a\x1b[2J\nb", "b=2")
    root = make_folder(tmp_path / "=images", classes=names, count=4).relative_to(tmp_path)
    assert train("a", "--dataset", "folder", "--data-path", str(root), "--image-size", "16", "--num-label", "4") == 0
    capsys.readouterr()
    assert evaluate("a/checkpoint.pth", "--predictions", "p.csv") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "a\\x1b[2J\\nb" in out
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["label_name"] for row in rows[::4]] == ["'=1+1", "'@x", "a\x1b[2J\nb", "b=2"]
    assert rows[0]["file"] == "'=images/test/=1+1/00.png"
    assert not any(value.startswith(("=", "+", "-", "@", "\t", "\r")) for row in rows for value in row.values())


def test_other_test_images_are_measured_only_where_the_command_says_so_and_called_others(train, tmp_path, capsys):
    root, other = few_images(tmp_path / "images"), few_images(tmp_path / "other", seed=1)
    assert train("a", *FEW, "--data-path", str(root), "--total-steps", "1") == 0
    path = tmp_path / "a" / "checkpoint.pth"
    root.rename(tmp_path / "moved")
    capsys.readouterr()
    assert evaluate(path, "--data-path", tmp_path / "moved") == 0 and "differ" not in capsys.readouterr().out
    assert evaluate(path, "--data-path", other) == 0
    assert "8 images, 2 classes; not what the run was tested on: the test pixels differ" in capsys.readouterr().out
    other.rename(root)
    assert evaluate(path) == 2
    assert f"{root} is not what {path} was tested on: the test pixels differ: give a folder" in capsys.readouterr().err


def test_many_classes_are_told_by_their_most_frequent_confusions():
    labels = torch.arange(30).repeat(4)
    predicted = labels.clone()
    predicted[labels == 3], predicted[0] = 7, 1
    lines = list(report(labels, predicted, torch.full((120,), 0.5), [f"class {k}" for k in range(30)]))
    assert lines[-2:] == ["     4  class 3 taken for class 7", "     1  class 0 taken for class 1"]
    assert lines[0] == "accuracy 95.83 %, error 4.17 % (115 of 120 are right)"
    assert "confusion matrix" not in "".join(lines)


def test_logits_that_are_not_finite_end_the_training_at_its_last_good_checkpoint(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metasemi, "training_step", metasemi.training_step)      # put back afterwards
    negative_variance(5)
    assert train("a", "--no-meta") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the logits of 100 of 100 images are not finite in evaluation mode at step 6" in error
    assert "checkpoint.pth of step 3 is intact" in error
    assert [line["step"] for line in records(tmp_path / "a") if "test/accuracy" in line] == [3]


def test_logits_that_are_not_finite_are_no_predictions(run, tmp_path, capsys):
    saved = torch.load(run / "checkpoint.pth", weights_only=True)
    spoil(saved["model"])
    torch.save(saved, tmp_path / "x.pth")
    assert evaluate(tmp_path / "x.pth", "--predictions", tmp_path / "p.csv") == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and not (tmp_path / "p.csv").exists()
    assert f"argument --evaluate: {tmp_path / 'x.pth'}: the logits of 100 of 100 images are not finite" in error


def test_what_cannot_be_evaluated_is_one_line_and_writes_nothing(run, tmp_path, capsys):
    state = torch.load(run / "checkpoint.pth", weights_only=True)
    spoiled = {k: v * float("nan") if v.is_floating_point() else v for k, v in state["model"].items()}
    for name, content in (("other", {"weights": [1]}), ("nan", spoiled), ("evil", Malicious()), ("empty", {}),
                          ("odd", {"state_dict": {"a": 1}}),
                          ("unknown", {**state, "args": {**state["args"], "dataset": "mnist"}}),
                          ("code", {**state, "args": {**state["args"], "arch": f"{tmp_path}/net.py:Net"}})):
        torch.save(content, tmp_path / f"{name}.pth")
    (tmp_path / "damaged.pth").write_bytes((run / "checkpoint.pth").read_bytes()[:-50])
    (tmp_path / "net.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    before = sorted(tmp_path.iterdir())
    good, digits = run / "checkpoint.pth", ["--dataset", "digits", "-a"]
    for flags, message in (
            ([tmp_path / "other.pth"], "neither a state dict nor a checkpoint of train_meta.py"),
            ([tmp_path / "empty.pth"], "neither a state dict nor a checkpoint of train_meta.py"),
            ([tmp_path / "odd.pth"], "neither a state dict nor a checkpoint of train_meta.py"),
            ([tmp_path / "evil.pth"], "could run code"),
            ([tmp_path / "damaged.pth"], "damaged.pth is not a checkpoint that can be read safely"),
            ([tmp_path / "nan.pth", *digits, "convsmall"], "are not finite"),
            ([tmp_path / "nan.pth", *digits, "wideresnet"], "do not fit wideresnet"),
            ([tmp_path / "unknown.pth"], "unknown data set 'mnist'"),
            ([tmp_path / "code.pth"], "which is code: it runs only if you say -a"),
            ([good, "--dataset", "svhn"], "--dataset: svhn, but"),
            ([good, "--image-size", "64"], "--image-size: 64, but"),
            ([good, "-a", "wideresnet"], "was trained with convsmall"),
            ([good, "--precision", "tf32", "--device", "cpu"], "tf32 exists on CUDA only")):
        assert evaluate(*flags, "--predictions", tmp_path / "p.csv") == 2, flags
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.iterdir()) == before
