"""Figure 3: what is embedded, measured and written, and what is refused."""
import csv
import json

import numpy as np
import pytest
import torch
from conftest import SHORT
from oracle import close
from PIL import Image

import plot_features
import train_meta
from datasets import load_dataset
from models import build_model
from reproduction.figures import draw_curves, draw_features
from utils.errors import UsageError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A supervised and a MetaSemi run of a few steps, with different splits."""
    root = tmp_path_factory.mktemp("runs")
    assert train_meta.main([*SHORT, "--no-meta", "--save-path", str(root / "baseline")]) == 0
    assert train_meta.main([*SHORT, "--mix-up", "--seed", "2", "--save-path", str(root / "metasemi")]) == 0
    return root


def plot(*flags):
    try:
        return plot_features.main([str(flag) for flag in flags])
    except SystemExit as error:
        return error.code


def test_two_checkpoints_make_a_figure_of_two_rows_with_their_data(runs, tmp_path, capsys):
    paths = [runs / "baseline" / "model_best.pth", runs / "metasemi" / "model_best.pth"]
    assert plot("--dataset", "digits", "--checkpoint-path", *paths, "--row-label", "Baseline", "MetaSemi",
                "--save-path", tmp_path, "--num-point", 100, "--method", "pca", "--mark-errors") == 0
    assert "MetaSemi, test: 5-nearest-neighbor accuracy" in capsys.readouterr().out
    with Image.open(tmp_path / "features.png") as image:
        assert len(image.convert("RGB").resize((200, 120)).getcolors(24_000)) > 50
    assert (tmp_path / "features.pdf").read_bytes().startswith(b"%PDF")
    images = load_dataset("digits", ".")
    summary = json.loads((tmp_path / "embedding.json").read_text())
    with np.load(tmp_path / "embedding.npz") as data:
        assert data["labels"].tolist() == ["Baseline", "MetaSemi"]
        for i, name in enumerate(("baseline", "metasemi")):
            part, sample, classes = data[f"part_{i}"], data[f"sample_{i}"], data[f"classes_{i}"]
            labeled = [int(line) for line in (runs / name / "label_indices.txt").read_text().split()]
            assert sample[part == "labeled"].tolist() == labeled
            assert not set(sample[part == "unlabeled"]) & set(labeled)
            assert [(part == p).sum() for p in ("labeled", "unlabeled", "test")] == [50, 100, 100]
            assert classes[part == "test"].tolist() == images.test_labels[sample[part == "test"]].tolist()
            assert classes[part != "test"].tolist() == images.train_labels[sample[part != "test"]].tolist()
            assert data[f"coordinates_{i}"].shape == (250, 2)
            assert set(summary["rows"][i]["knn_accuracy"]) == {"labeled", "unlabeled", "test"}
    assert summary["method"] == "pca" and summary["seed"] == 1234 and summary["software"].startswith("scikit-learn ")


def test_measures_equal_a_plain_vote_of_the_features(runs, tmp_path):
    path = runs / "metasemi" / "checkpoint.pth"
    assert plot("--checkpoint-path", path, "--save-path", tmp_path, "--method", "pca", "--num-point", 60) == 0
    data = np.load(tmp_path / "embedding.npz")
    part, sample, classes = data["part_0"], data["sample_0"], data["classes_0"]
    saved = torch.load(path, weights_only=True)
    model = build_model("convsmall", 10).eval()
    model.load_state_dict(saved["model"])
    images = load_dataset("digits", ".")
    pixels = torch.stack([(images.test_images if p == "test" else images.train_images)[i] for p, i in zip(part, sample)])
    x = (pixels / 255 - saved["mean"].view(-1, 1, 1)) / saved["std"].view(-1, 1, 1)
    with torch.no_grad():
        features = model.features(x).double()
        logits = model(x)
        predicted = torch.from_numpy(data["predictions_0"])[:, None]
        assert close(logits.gather(1, predicted)[:, 0], logits.max(dim=1).values)       # the largest, up to rounding
    known = np.flatnonzero(part == "labeled")
    right = []
    for i in np.flatnonzero(part == "test"):
        nearest = sorted(known, key=lambda j: (features[i] - features[j]).norm().item())[:5]
        votes = np.bincount(classes[nearest], minlength=10)
        right.append(votes.argmax() == classes[i])
    accuracy = json.loads((tmp_path / "embedding.json").read_text())["rows"][0]["knn_accuracy"]["test"]
    assert accuracy == pytest.approx(np.mean(right), abs=1.01 / 60)             # one vote may be as close as rounding
    centered = features - features.mean(dim=0)
    expected = centered @ torch.linalg.svd(centered, full_matrices=False).Vh[:2].T
    assert close(torch.from_numpy(data["coordinates_0"]).abs(), expected.abs(), 1000)


def test_same_seed_gives_the_same_coordinates_whatever_the_number_of_threads(runs, tmp_path):
    coordinates, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            assert plot("--checkpoint-path", runs / "metasemi" / "model_best.pth", "--save-path", tmp_path / f"out{threads}",
                        "--num-point", "100", "--perplexity", "10") == 0
        finally:
            torch.set_num_threads(before)
        with np.load(tmp_path / f"out{threads}" / "embedding.npz") as data:
            coordinates.append(data["coordinates_0"])
    assert np.array_equal(*coordinates)
    assert 0 < json.loads((tmp_path / "out1" / "embedding.json").read_text())["rows"][0]["kl_divergence"] < 5


@pytest.mark.parametrize(("flags", "embedded", "drawn", "said"), [
    (("--num-point", "60", "--embed-all"), 1297 + 100, 50 + 60 + 60, 0), (("--num-point", "5000"), 1397, 1397, 2)])
def test_the_points_that_are_embedded_and_drawn_are_as_many_as_asked_for_or_there_are(runs, tmp_path, capsys, flags, embedded,
                                                                                      drawn, said):
    path = runs / "baseline" / "model_best.pth"
    assert plot("--checkpoint-path", path, "--save-path", tmp_path, "--method", "pca", *flags) == 0
    out = capsys.readouterr().out
    assert out.count("images are drawn: there are fewer than --num-point 5000") == said
    assert ("all 1,247 unlabeled" in out) == ("all 100 test" in out) == bool(said)
    with np.load(tmp_path / "embedding.npz") as data:
        assert (len(data["coordinates_0"]), data["drawn_0"].sum()) == (embedded, drawn)


def test_what_does_not_fit_a_checkpoint_is_one_line_and_writes_nothing(runs, tmp_path, capsys):
    good, index = runs / "baseline" / "model_best.pth", tmp_path / "index.txt"
    saved = torch.load(good, weights_only=True)
    first = next(iter(saved["model"]))
    for name, model in (("nan", {**saved["model"], first: saved["model"][first] * float("nan")}),
                        ("foreign", {first: saved["model"][first]})):
        torch.save({**saved, "model": model}, tmp_path / f"{name}.pth")
    for path, flags, text, message in (
            (tmp_path / "nan.pth", [], "", "are not finite"),
            (tmp_path / "foreign.pth", [], "", "do not fit convsmall"),
            (good, ["--index-path", index], "a/b.png\n", "is not the split that the checkpoint was"),
            (good, ["--index-path", index], "1\n2\n", "is not the split that the checkpoint was"),
            (good, ["--dataset", "svhn"], "", "--dataset: svhn, but"),
            (good, ["--num-point", "20", "--perplexity", "30"], "", "--perplexity: 30 is too large for 90 points"),
            (good, ["--row-label", "a", "b"], "", "--row-label: 2 values for 1 checkpoints")):
        index.write_text(text)
        assert plot("--checkpoint-path", path, *flags, "--save-path", tmp_path / "out") == 2, flags
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists(), flags


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert plot("--curves", tmp_path, "--save-path", tmp_path / "out") == 2
    assert capsys.readouterr().err == "plot_features.py: it takes one process: leave out torchrun\n"


@pytest.mark.parametrize(("features", "message"), [
    (lambda f: torch.ones_like(f) * torch.arange(f.shape[1]), "differ by 0: nothing can be shown"),
    (lambda f: f * 1e30, "nothing can be shown unless that is between"),
    (lambda f: f[:, 0], "gives a Tensor of shape (120,) for 120 images: expected a tensor (B, D), D at least 2"),
    (lambda f: f[1:], "gives a Tensor of shape (119, 16) for 120 images"),
    (lambda f: f / 0, "its features or logits are not finite")])
def test_features_that_make_no_figure_are_one_line(runs, tmp_path, monkeypatch, capsys, features, message):
    def build(*args):
        model = build_model(*args)
        usual = model.features
        model.features = lambda x: features(usual(x))
        return model

    monkeypatch.setattr("utils.setup.build_model", build)
    (tmp_path / "a.pth").write_bytes((runs / "baseline" / "model_best.pth").read_bytes())
    assert plot("--checkpoint-path", tmp_path / "a.pth", "--save-path", tmp_path / "out", "--num-point", "70") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_names_are_drawn_as_they_are_and_never_read_as_mathematics(tmp_path):
    names, classes = ["$", "a$b$\\frac{", "_x", "\x1b[2J\n\udcff"], np.arange(12) // 3
    row = {"label": names[0], "knn_accuracy": {"test": 0.5}, "coordinates": np.eye(12, 2), "classes": classes,
           "part": np.array(["labeled", "unlabeled", "test"] * 4), "predictions": classes, "drawn": np.full(12, True)}
    assert all(path.exists() for path in draw_features([row, {**row, "classes": classes.copy()}], names, tmp_path, "$x_{$"))


@pytest.fixture
def curves(tmp_path, monkeypatch):
    """curves(*runs): the axes of test error; a run is (seed, accuracies at step 400, 800, ..., more flags, labels' SHA-256).

    labels: as for `draw_curves`."""
    drawn = []
    monkeypatch.setattr("reproduction.figures.save", lambda fig, *args: drawn.append(fig) or [])

    def draw(*runs, labels=None):
        folders = []
        for seed, accuracies, more, data in runs:
            folders.append(tmp_path / f"run{len(list(tmp_path.glob('run*')))}")
            folders[-1].mkdir()
            flags = {"dataset": "cifar10", "num_label": 4000, "arch": "convlarge", "mix_up": True, "no_meta": False,
                     "seed": seed, "split": f"{seed}.txt", "data_path": "data", **more}
            (folders[-1] / "args.json").write_text(json.dumps({"args": flags}))
            (folders[-1] / "split.json").write_text(json.dumps({"sha256": str(seed), "labels_sha256": data}))
            lines = [{"step": 100, "train/loss": 1.0}]
            lines += [{"step": 400 * i, "test/accuracy": accuracy} for i, accuracy in enumerate(accuracies, 1)]
            (folders[-1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        draw_curves(folders, tmp_path, labels)
        return drawn[-1].axes[0]
    return draw


def test_curves_of_other_data_are_other_lines_and_a_run_counts_once(curves):
    folder = {"dataset": "folder", "data_path": "a"}
    ax = curves((1, [0.5], folder, "few classes"), (2, [0.9], {**folder, "data_path": "b"}, "many classes"))
    assert [line.get_ydata().tolist() for line in ax.lines] == [[50.0], [pytest.approx(10.0)]]
    with pytest.raises(UsageError, match="run2 and .*run3 are the same run, seed 1 with the same labeled images: give each"):
        curves((1, [0.5], {}, "x"), (1, [0.5], {"data_path": "elsewhere"}, "x"))


def test_curves_are_named_by_the_flags_in_which_they_differ_or_as_the_user_says_and_are_as_long_as_the_shortest_run(curves):
    runs = (1, [0.5], {"lr": 0.1}, "x"), (1, [0.6, 0.7], {"lr": 0.2}, "x"), (2, [0.5], {"lr": 0.2}, "x")
    first, _, second, _ = curves(*runs).lines               # each with the published value behind it
    assert [line.get_label().rpartition("convlarge")[2] for line in (first, second)] == [
        ", --lr 0.1, n = 1", ", --lr 0.2, n = 2, to step 400 (the longest: 800)"]
    assert second.get_xdata().tolist() == [400] and second.get_marker() == "o"
    ax = curves(*runs[:2], labels=["slow", "小さい"])
    assert [line.get_label() for line in ax.lines[::2]] == ["slow, n = 1", "line 2, n = 1"]
    with pytest.raises(UsageError, match="--row-label: 1 values for 2 lines: give one for each"):
        curves(*runs[:2], labels=["slow"])


def test_curves_average_seeds_and_show_the_published_value(curves, runs, tmp_path, monkeypatch):
    line, published = curves((1, (0.5, 0.9), {}, "x"), (2, (0.7, 0.8), {}, "x")).lines
    assert line.get_ydata() == pytest.approx([40.0, 15.0]) and published.get_ydata()[0] == 7.78
    assert published.get_linestyle() == "--" and "n = 2" in line.get_label()
    monkeypatch.undo()
    assert plot("--curves", runs / "baseline", runs / "metasemi", "--save-path", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.csv", "curves.pdf", "curves.png"]
    lines = list(csv.DictReader((tmp_path / "out" / "curves.csv").read_text().splitlines()))
    assert {line["measure"] for line in lines} == {"test error in percent", "training loss"}
    record = json.loads((runs / "metasemi" / "metrics.jsonl").read_text().splitlines()[-1])
    last = [line for line in lines if "MetaSemi" in line["name"] and line["measure"] == "test error in percent"][-1]
    assert (last["step"], last["n"]) == ("7", "1") and float(last["mean"]) == pytest.approx(100 * (1 - record["test/accuracy"]))
