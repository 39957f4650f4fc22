"""Figure 3: what is embedded, measured and written, and what is refused."""
import csv
import json
import os

import numpy as np
import pytest
import torch
from conftest import SHORT
from helpers import FEW, Malicious, few_images
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from oracle import close
from PIL import Image

import plot_features
import train_meta
from datasets import load_dataset
from models import build_model
from reproduction.figures import broken, draw_features, drawn_names, style, width
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
        assert image.width > 1500 and image.height > 900
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
    kl = json.loads((tmp_path / "out1" / "embedding.json").read_text())["rows"][0]["kl_divergence"]
    assert 0 < kl < 5


def test_one_labeled_image_a_class_has_no_silhouette_and_still_makes_the_figure(tmp_path, capsys):
    flags = [*SHORT, "--no-meta", "--num-label", "10", "--total-steps", "2"]
    assert train_meta.main([*flags, "--save-path", str(tmp_path / "a")]) == 0
    assert plot("--checkpoint-path", tmp_path / "a" / "checkpoint.pth", "--save-path", tmp_path, "--method", "pca",
                "--num-point", "40") == 0
    assert "labeled: 5-nearest-neighbor accuracy 0.00 %, no silhouette" in capsys.readouterr().out
    silhouette = json.loads((tmp_path / "embedding.json").read_text())["rows"][0]["silhouette"]
    assert silhouette["labeled"] is None and -1 <= silhouette["test"] <= 1


def test_other_images_than_those_of_the_checkpoint_are_refused(tmp_path, capsys):
    roots = [str(few_images(tmp_path / f"images{seed}", seed=seed)) for seed in (0, 1)]
    assert train_meta.main([*SHORT, *FEW, "--total-steps", "1", "--data-path", roots[0], "--save-path", str(tmp_path)]) == 0
    path = tmp_path / "checkpoint.pth"
    flags = ["--checkpoint-path", path, "--save-path", tmp_path / "out", "--method", "pca", "--num-workers", "0"]
    assert plot(*flags) == 0
    assert plot(*flags, "--data-path", roots[1]) == 2
    assert f"{roots[1]} is not what {path} was trained on: the training pixels, test pixels differ" in capsys.readouterr().err


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


def spoiled(runs, tmp_path, **changes):
    saved = torch.load(runs / "baseline" / "model_best.pth", weights_only=True)
    torch.save({**saved, **changes}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_bad_input_is_one_line_and_writes_nothing(runs, tmp_path, capsys):
    good = runs / "baseline" / "model_best.pth"
    state = torch.load(good, weights_only=True)["model"]
    for name, text in (("text", "1\nabc\n"), ("twice", "1\n1\n"), ("range", "1\n1297\n"), ("other", "1\n2\n")):
        (tmp_path / name).write_text(text)
    (tmp_path / "pickle.pth").write_bytes(b"no archive")
    torch.save({"step": 1, "model": Malicious(), "args": {}}, tmp_path / "malicious.pth")
    nan = {k: v * float("nan") if k == "body.0.0.conv.weight" else v for k, v in state.items()}
    foreign = {k: v for k, v in state.items() if "classifier" not in k}
    cases = [
        (["--checkpoint-path", tmp_path / "missing.pth"], "missing.pth does not exist"),
        (["--checkpoint-path", tmp_path / "pickle.pth"], "pickle.pth is not a checkpoint that can be read safely"),
        (["--checkpoint-path", tmp_path / "malicious.pth"], "malicious.pth is not a checkpoint that can be read safely"),
        (["--checkpoint-path", spoiled(runs, tmp_path, model=nan)], "are not finite"),
        (["--checkpoint-path", good, "--index-path", tmp_path / "text"], "'abc' is not the index of an image"),
        (["--checkpoint-path", good, "--index-path", tmp_path / "twice"], "names an image twice"),
        (["--checkpoint-path", good, "--index-path", tmp_path / "range"], "1297 is not an index below 1297"),
        (["--checkpoint-path", good, "--index-path", tmp_path / "other"], "is not the split that the checkpoint was"),
        (["--checkpoint-path", good, "--index-path", tmp_path / "none"], "none does not exist"),
        (["--checkpoint-path", good, "--dataset", "svhn"], "--dataset: svhn, but"),
        (["--checkpoint-path", good, "--num-point", "20", "--perplexity", "30"], "--perplexity: 30 is too large for 90 points"),
        (["--checkpoint-path", good, "--row-label", "a", "b"], "--row-label: 2 values for 1 checkpoints"),
        (["--checkpoint-path", good, "--method", "lda"], "--method"),
        (["--curves", tmp_path], "is not the folder of a run"),
        ([], "--checkpoint-path and --curves: give one of them"),
    ]
    for flags, message in cases:
        if flags and "x.pth" in str(flags[1]):
            spoiled(runs, tmp_path, model=nan)
        assert plot(*flags, "--save-path", tmp_path / "out") == 2, flags
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, flags
        assert not (tmp_path / "out").exists()
    assert plot("--checkpoint-path", spoiled(runs, tmp_path, model=foreign), "--save-path", tmp_path / "out") == 2
    assert "do not fit convsmall" in capsys.readouterr().err
    assert not (tmp_path / "pwned").exists() and not os.path.exists("pwned")


@pytest.mark.parametrize(("features", "message"), [
    (lambda f: torch.ones_like(f) * torch.arange(f.shape[1]), "differ by 0: nothing can be shown"),
    (lambda f: f * 1e30, "nothing can be shown unless that is between"),
    (lambda f: f * 1e-30, "nothing can be shown unless that is between"),
    (lambda f: f[:, 0], "gives a Tensor of shape (120,) for 120 images: expected a tensor (B, D), D at least 2"),
    (lambda f: f[:, :1], "gives a Tensor of shape (120, 1) for 120 images"),
    (lambda f: f[1:], "gives a Tensor of shape (119, 16) for 120 images"),
    (lambda f: [f], "gives a list of shape () for 120 images"),
    (lambda f: f / 0, "the features or the logits of")])
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


@pytest.mark.parametrize("names", [("$", "a$b$\\frac{", "_x", "\x1b[2J\n\udcff")])
def test_names_are_drawn_as_they_are_and_never_read_as_mathematics(tmp_path, names):
    rng = np.random.default_rng(0)
    classes = np.arange(60) % 4
    row = {"label": names[0], "knn_accuracy": {"test": 0.5}, "coordinates": rng.normal(size=(60, 2)), "classes": classes,
           "part": np.array(["labeled", "unlabeled", "test"] * 20), "predictions": classes, "drawn": np.arange(60) < 50}
    assert all(path.exists() for path in draw_features([row], names, tmp_path, "$x_{$"))


def legend_of(names, tmp_path, monkeypatch, label="row"):
    """The figure with some classes, and the texts of its legend."""
    drawn = {}
    monkeypatch.setattr("reproduction.figures.save", lambda fig, *paths: drawn.update(fig=fig) or list(paths))
    classes = np.arange(3 * len(names)) // 3
    row = {"label": label, "knn_accuracy": {"test": 0.5}, "coordinates": np.eye(len(classes), 2), "classes": classes,
           "part": np.array(["labeled", "unlabeled", "test"] * len(names)), "predictions": classes,
           "drawn": np.full(len(classes), True)}
    draw_features([row], names, tmp_path, "title")
    fig = drawn["fig"]
    return fig, [text.get_text() for legend in fig.legends for text in legend.get_texts()]


@pytest.mark.parametrize("names", [
    [f"Nova Scotia Duck Tolling Retriever {k}" for k in range(10)], [f"bird {k}" for k in range(30)], ["x" * 255, "y" * 254],
    ["W" * 45] * 12])
def test_no_name_leaves_the_figure(names, tmp_path, monkeypatch):
    fig, texts = legend_of(names, tmp_path, monkeypatch, "W" * 45)
    FigureCanvasAgg(fig).draw()
    assert [text.replace("\n", "") for text in texts][:len(names)] == names
    label = fig.axes[0].yaxis.label
    assert label.get_text().replace("\n", "").startswith("W" * 45)
    panels = min(ax.get_window_extent().y0 for ax in fig.axes)
    for part in (*(text for legend in fig.legends for text in legend.get_texts()), label, fig._suptitle):
        box = part.get_window_extent()
        assert fig.bbox.x0 <= box.x0 and box.x1 <= fig.bbox.x1 and fig.bbox.y0 <= box.y0 and box.y1 <= fig.bbox.y1
        assert part in (label, fig._suptitle) or box.y1 < panels
    assert min(ax.get_window_extent().height for ax in fig.axes) > 1.8 * fig.dpi


def test_a_name_that_the_font_cannot_draw_is_a_number_and_so_are_more_classes_than_looks(tmp_path, monkeypatch):
    fig, texts = legend_of(["кошка", "猫", "كلب", "a\n"], tmp_path, monkeypatch)
    assert texts[:4] == ["кошка", "class 1", "كلب", r"a\n"]
    assert fig._suptitle.get_text() == "title; the names of the numbers are in embedding.json"
    assert drawn_names(["日本語"], "row", 5) == ["row 5"]
    fig, texts = legend_of([f"{k}" for k in range(31)], tmp_path, monkeypatch)
    assert texts[0] == "All: labeled" and fig.axes[-1].get_ylabel() == "number of the class in the list of embedding.json"


@given(st.text(st.characters(codec="ascii"), min_size=1, max_size=80), st.floats(1, 4))
def test_a_broken_text_is_as_narrow_as_it_can_be_and_loses_no_word(text, inches):
    lines = broken(text, inches, 10).split("\n")
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(width(line, 10) <= inches for line in lines)


@pytest.fixture
def curves(tmp_path, monkeypatch):
    """curves(*runs): the axes of test error; a run is (seed, accuracies at step 400, 800, ..., more flags, labels' SHA-256).

    labels: as for `draw_curves`."""
    import reproduction.figures

    drawn = {}
    monkeypatch.setattr(reproduction.figures, "save", lambda fig, *args: drawn.update(fig=fig) or [])

    def draw(*runs, labels=None):
        folders = []
        for seed, accuracies, more, data in runs:
            folders.append(tmp_path / f"run{len(list(tmp_path.glob('run*')))}")
            folders[-1].mkdir()
            flags = {"dataset": "cifar10", "num_label": 4000, "arch": "convlarge", "mix_up": True, "no_meta": False,
                     "seed": seed, "split": f"{seed}.txt", "data_path": "data", **more}
            (folders[-1] / "args.json").write_text(json.dumps({"args": flags}))
            (folders[-1] / "split.json").write_text(json.dumps({"sha256": str(seed), "labels_sha256": data}))
            lines = [{"step": 100, "train/loss": 1.0}, *({"step": 400 * i, "test/accuracy": a}
                                                         for i, a in enumerate(accuracies, 1))]
            (folders[-1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        reproduction.figures.draw_curves(folders, tmp_path, labels)
        return drawn["fig"].axes[0]
    return draw


def test_curves_of_other_data_are_other_lines_and_a_run_counts_once(curves):
    folder = {"dataset": "folder", "data_path": "a"}
    ax = curves((1, [0.5], folder, "few classes"), (2, [0.9], {**folder, "data_path": "b"}, "many classes"))
    assert [line.get_ydata().tolist() for line in ax.lines] == [[50.0], [pytest.approx(10.0)]]
    with pytest.raises(UsageError, match="run2 and .*run3 are the same run, seed 1 with the same labeled images: give each"):
        curves((1, [0.5], {}, "x"), (1, [0.5], {"data_path": "elsewhere"}, "x"))


def test_curves_are_named_by_the_flags_in_which_they_differ_or_as_the_user_says_and_one_evaluation_is_a_point(curves):
    runs = (1, [0.5], {"lr": 0.1}, "x"), (1, [0.6, 0.7], {"lr": 0.2}, "x"), (1, [0.5], {"arch": "convsmall"}, "x")
    first, _, second, _, third, _ = curves(*runs).lines      # each with the published value behind it
    assert [line.get_label().rpartition("convlarge")[2] for line in (first, second)] == [
        ", --lr 0.1, n = 1", ", --lr 0.2, n = 1"]
    assert third.get_label().endswith("4000 labels, convsmall, n = 1")
    assert [line.get_marker() for line in (first, second, third)] == ["o", "", "o"]
    ax = curves(*runs, labels=["slow", "fast", "小さい"])
    assert [line.get_label() for line in ax.lines[::2]] == ["slow, n = 1", "fast, n = 1", "line 3, n = 1"]
    with pytest.raises(UsageError, match="--row-label: 2 values for 3 lines: give one for each"):
        curves(*runs, labels=["slow", "fast"])


def test_the_axis_of_the_error_shows_what_there_is_to_see(curves):
    ax = curves((1, [0.30, 0.42, 0.46], {"dataset": "digits"}, "x"))
    assert 53 < ax.get_ylim()[0] < 54 and 70 < ax.get_ylim()[1] < 71


def test_curves_say_when_their_runs_differ_in_length(curves, capsys):
    ax = curves((1, [0.5, 0.6, 0.7], {}, "x"), (2, [0.5], {}, "x"))
    assert ax.lines[0].get_xdata().tolist() == [400]
    assert ", n = 2, to step 400 (the longest: 1200)" in ax.lines[0].get_label()
    assert "the runs differ in length, and are drawn as far as the shortest" in capsys.readouterr().out


def test_curves_average_seeds_and_show_the_published_value(curves, runs, tmp_path, monkeypatch):
    line, published = curves((1, (0.5, 0.9), {}, "x"), (2, (0.7, 0.8), {}, "x")).lines
    assert line.get_ydata() == pytest.approx([40.0, 15.0]) and published.get_ydata()[0] == 7.78
    assert published.get_linestyle() == "--" and "n = 2" in line.get_label()
    monkeypatch.undo()
    assert plot("--curves", runs / "baseline", runs / "metasemi", "--save-path", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.csv", "curves.pdf", "curves.png"]
    with open(tmp_path / "out" / "curves.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["measure"] for line in lines} == {"test error in percent", "training loss"}
    record = json.loads((runs / "metasemi" / "metrics.jsonl").read_text().splitlines()[-1])
    last = [line for line in lines if "MetaSemi" in line["name"] and line["measure"] == "test error in percent"][-1]
    assert (last["step"], last["n"]) == ("7", "1") and float(last["mean"]) == pytest.approx(100 * (1 - record["test/accuracy"]))


def test_up_to_thirty_classes_have_a_look_of_their_own():
    assert len({style(k, 30) for k in range(30)}) == 30
    assert len({style(k, 100) for k in range(100)}) == 100
