"""train_meta.py --evaluate: what it measures, prints and writes, and what it refuses."""
import csv
import re

import numpy as np
import pytest
import torch
from helpers import FEW, Malicious, contents, few_images, records
from oracle import close
from test_datasets import make_folder

import train_meta
from datasets import load_dataset
from datasets.decoding import decode_file
from models import build_model
from utils.evaluation import report


def evaluate(*flags):
    try:
        return train_meta.main(["--evaluate", *map(str, flags)])
    except SystemExit as error:
        return error.code


@pytest.fixture
def run(whole):
    return whole("--mix-up")


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def probabilities(path, pixels):
    """Returns what the network of a checkpoint says of images (N, 3, S, S) uint8, by a road of its own."""
    saved = torch.load(path, weights_only=True)
    model = build_model("convsmall", len(saved["class_names"])).eval()
    model.load_state_dict(saved["model"])
    with torch.no_grad():
        return model((pixels / 255 - saved["mean"].view(-1, 1, 1)) / saved["std"].view(-1, 1, 1)).softmax(dim=1)


def test_the_report_has_a_row_for_each_true_class_also_of_one_that_is_absent():
    labels, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 2, 2])
    text = "\n".join(report(labels, predicted, ["a", "b", "c", "d"]))
    assert text.startswith("accuracy 66.67 %, error 33.33 % (4 of 6 are right)\n")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[-4:] == ["a 1 1 0 0", "b 0 1 0 0", "c 1 0 2 0", "d 0 0 0 0"] and "b 0.5000 1.0000 0.6667 1" in lines
    many = torch.arange(30)                                 # whose matrix is too large
    assert not any("confusion matrix" in part for part in report(many, many, [f"class {k}" for k in range(30)]))


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint.prev.pth"])
def test_the_accuracy_is_exactly_what_the_run_recorded_at_that_step(run, capsys, name):
    before = contents(run)
    assert evaluate(run / name) == 0
    out = capsys.readouterr().out
    step = torch.load(run / name, weights_only=True)["step"]
    recorded = [line["test/accuracy"] for line in records(run) if line["step"] == step and "test/accuracy" in line]
    right, count = map(int, re.search(r"\((\d+) of (\d+) are right\)", out).groups())
    assert [right / count] == recorded and count == 100
    assert f"of step {step}: convsmall on cpu, float32" in out and "test set of digits: 100 images, 10 classes" in out
    assert contents(run) == before


def test_everything_printed_and_written_follows_from_the_logits(run, tmp_path, capsys):
    assert evaluate(run / "checkpoint.pth", "--predictions", tmp_path / "p.csv") == 0
    out = capsys.readouterr().out
    images, rows = load_dataset("digits", "."), rows_of(tmp_path / "p.csv")
    p = probabilities(run / "checkpoint.pth", images.test_images)
    predicted = torch.tensor([int(row["predicted"]) for row in rows])
    confidence = p.gather(1, predicted[:, None])[:, 0]
    assert close(confidence, p.max(dim=1).values)               # no other class is likelier, up to rounding
    assert list(rows[0])[:6] == ["file", "predicted", "predicted_name", "confidence", "label", "label_name"]
    assert [(int(row["file"]), int(row["label"])) for row in rows] == list(enumerate(images.test_labels.tolist()))
    assert [float(row["confidence"]) for row in rows] == pytest.approx(confidence.tolist(), abs=1e-5)
    assert [[float(row[str(k)]) for k in range(10)] for row in rows] == [pytest.approx(q, abs=1e-5) for q in p.tolist()]
    matrix = torch.bincount(10 * images.test_labels + predicted, minlength=100).view(10, 10)
    printed = [list(map(int, line.split())) for line in out.splitlines() if re.fullmatch(r"\d+( +\d+){10}", line)]
    assert printed == [[k, *row] for k, row in enumerate(matrix.tolist())]


def test_a_bare_state_dict_is_normalized_as_the_data_set_is_and_gives_the_same(run, tmp_path, capsys):
    weights = torch.load(run / "checkpoint.pth", weights_only=True)["model"]
    assert evaluate(run / "checkpoint.pth") == 0
    expected = capsys.readouterr().out.splitlines()[2:]
    for content in (weights, {"step": 7, "state_dict": weights, "best_acc": 0.5}):      # the second of another program
        torch.save(content, tmp_path / "weights.pth")
        assert evaluate(tmp_path / "weights.pth", "--dataset", "digits", "-a", "convsmall") == 0
        assert capsys.readouterr().out.splitlines()[2:] == expected


def test_a_folder_of_the_users_own_names_its_files_and_classes_none_of_which_is_a_formula_or_an_escape_sequence(
        train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ("=1+1", "@x", "a\x1b[2J\nb", "bée=2, or not")
    root = make_folder(tmp_path / "images", classes=names, count=4)
    flags = ["--dataset", "folder", "--data-path", str(root), "--image-size", "16", "--num-label", "4"]
    assert train("a", *flags, "--precision", "bfloat16") == 0
    root = root.rename(tmp_path / "=moved").relative_to(tmp_path)
    assert evaluate("a/checkpoint.pth", "--data-path", root, "--predictions", "p.csv") == 0
    out, rows = capsys.readouterr().out, rows_of("p.csv")
    assert f"test set of folder under {root}: 16 images, 4 classes" in out
    assert "\x1b" not in out and "a\\x1b[2J\\nb" in out
    assert [row["label_name"] for row in rows] == [name for name in ("'=1+1", "'@x", *names[2:]) for _ in range(4)]
    assert [row["file"] for row in rows[3:13:9]] == ["'=moved/test/=1+1/03.png", "'=moved/test/bée=2, or not/00.png"]
    assert not any(value.startswith(("=", "+", "-", "@", "\t", "\r")) for row in rows for value in row.values())
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert [line["test/accuracy"] for line in records(tmp_path / "a") if "test/accuracy" in line][-1] == right / 16
    for part in ("train", "test"):
        (root / part / "@x").rename(root / part / "asp")
    assert evaluate("a/checkpoint.pth", "--data-path", root) == 2
    assert "has other classes than" in capsys.readouterr().err


def test_images_without_classes_are_predicted_with_every_probability_and_no_accuracy(run, train, tmp_path, capsys):
    root = make_folder(tmp_path / "images", classes=("=ant", "bee, or not"), count=4)
    assert train("a", "--dataset", "folder", "--data-path", str(root), "--image-size", "16", "--num-label", "4") == 0
    heap = (root / "test").rename(tmp_path / "heap")
    (heap / "=ant" / "00.png").rename(heap / "flat.png")
    files = [str(path) for path in sorted(heap.rglob("*.png"), key=str)]
    command = [tmp_path / "a" / "checkpoint.pth", "--num-workers", "0", "--data-path", heap]
    assert evaluate(*command) == 2 and "add --predictions FILE.csv" in capsys.readouterr().err
    command = [*command, "--predictions", tmp_path / "p.csv"]
    assert evaluate(*command) == 0
    out = capsys.readouterr().out
    assert f"{heap}: 8 images without a class" in out and not re.search(r"accuracy \d|error|confusion|%", out)
    rows = rows_of(tmp_path / "p.csv")
    assert list(rows[0]) == ["file", "predicted", "predicted_name", "confidence", "'=ant", "bee, or not"]
    assert [row["file"] for row in rows] == files
    pixels = torch.from_numpy(np.stack([decode_file(path, 16) for path in files]))
    for row, p in zip(rows, probabilities(tmp_path / "a" / "checkpoint.pth", pixels)):
        assert [float(row["'=ant"]), float(row["bee, or not"])] == pytest.approx(p.tolist(), abs=1e-5)
        assert row["predicted_name"] == ("'=ant", "bee, or not")[int(row["predicted"])] and int(row["predicted"]) == p.argmax()
    assert evaluate(tmp_path / "a", "--data-path", heap / "flat.png", "--predictions", tmp_path / "one.csv") == 0
    (one,), same = rows_of(tmp_path / "one.csv"), rows[files.index(str(heap / "flat.png"))]
    assert one["file"] == same["file"] and float(one["confidence"]) == pytest.approx(float(same["confidence"]), abs=1e-5)
    (heap / "flat.png").write_bytes(b"broken")
    assert evaluate(*command) == 2 and "flat.png cannot" in capsys.readouterr().err
    assert evaluate(*command, "--skip-corrupt") == 0
    assert "heap: 7 images" in capsys.readouterr().out and len(rows_of(tmp_path / "p.csv")) == 7
    assert evaluate(run / "checkpoint.pth", "--data-path", heap / "bee, or not", "--predictions", tmp_path / "p.csv") == 0
    assert len(rows_of(tmp_path / "p.csv")) == 4 and "9" in rows_of(tmp_path / "p.csv")[0]


def test_other_test_images_are_measured_only_where_the_command_says_so_and_called_others(train, tmp_path, capsys):
    root, other = few_images(tmp_path / "images"), few_images(tmp_path / "other", seed=1)
    assert train("a", *FEW, "--data-path", str(root), "--total-steps", "1") == 0
    path = tmp_path / "a" / "checkpoint.pth"
    root.rename(tmp_path / "moved")
    assert evaluate(path, "--data-path", tmp_path / "moved") == 0 and "differ" not in capsys.readouterr().out
    assert evaluate(path, "--data-path", other) == 0
    assert "8 images, 2 classes; not what the run was tested on: the test pixels differ" in capsys.readouterr().out
    other.rename(root)
    assert evaluate(path) == 2
    assert f"{root} is not what {path} was tested on: the test pixels differ: give a folder" in capsys.readouterr().err


def test_what_cannot_be_evaluated_is_one_line_and_writes_nothing(run, tmp_path, capsys):
    state = torch.load(run / "checkpoint.pth", weights_only=True)
    spoiled = {k: v * float("nan") if v.is_floating_point() else v for k, v in state["model"].items()}
    for name, content in (("other", {"weights": [1]}), ("nan", spoiled), ("evil", Malicious()),
                          ("less", {key: value for key, value in state.items() if key != "mean"}),
                          ("unknown", {**state, "args": {**state["args"], "dataset": "mnist"}}),
                          ("code", {**state, "args": {**state["args"], "arch": f"{tmp_path}/net.py:Net"}})):
        torch.save(content, tmp_path / f"{name}.pth")
    (tmp_path / "net.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    before = sorted(tmp_path.iterdir())
    good, digits = run / "checkpoint.pth", ["--dataset", "digits", "-a"]
    for flags, message in (
            ([tmp_path / "other.pth"], "neither a state dict nor a checkpoint of train_meta.py"),
            ([tmp_path / "less.pth"], "less.pth is damaged"),
            ([tmp_path / "evil.pth"], "could run code"),
            ([tmp_path / "nan.pth", *digits, "convsmall"], "are not finite"),
            ([tmp_path / "nan.pth", *digits, "wideresnet"], "do not fit wideresnet"),
            ([tmp_path / "unknown.pth"], "unknown.pth is damaged"),
            ([tmp_path / "code.pth"], "which is code: it runs only if you say -a"),
            ([good, "--dataset", "svhn"], "--dataset: svhn, but"),
            ([good, "-a", "wideresnet"], "was trained with convsmall"),
            ([good, "--precision", "tf32", "--device", "cpu"], "tf32 exists on CUDA only")):
        assert evaluate(*flags, "--predictions", tmp_path / "p.csv") == 2, flags
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.iterdir()) == before
