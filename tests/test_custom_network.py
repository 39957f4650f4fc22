"""The user's own images, network and list of labeled images."""
import json
import os
import py_compile
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHORT
from helpers import contents, differing, tensors
from test_datasets import make_folder

import plot_features
import train_meta
from datasets import DataError, load_dataset
from datasets.splits import split_labels, split_training
from models import NetworkError, build_model, check_network, custom

HEAD = """import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
"""
NETWORKS = {
    "without batch norm, and with view": """
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8)
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, x):
        return self.classifier(self.norm(self.conv(x)).relu_().view(len(x), -1))
""",
    "batch norm of its own, and dropout": """
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Flatten(),
                                  nn.BatchNorm1d(1568, affine=False), nn.Linear(1568, num_classes))

    def forward(self, x):
        return self.body(x)
""",
    "frozen parameters": """
        self.stem = nn.Conv2d(3, 8, 3).requires_grad_(False)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.stem(x).relu().mean(dim=(2, 3)))
""",
    "stochastic depth": """         # a branch that takes no part has no gradient, and no momentum at first
        self.head, self.branch = nn.Linear(768, num_classes), nn.Linear(768, num_classes)

    def forward(self, x):
        share = torch.rand(()).item() < 0.5 if self.training else 0.5
        return self.head(x.flatten(1)) + (share * self.branch(x.flatten(1)) if share else 0)
""",
    "unused parameters": """
        self.unused, self.head = nn.Linear(7, 7), nn.Linear(768, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1))
""",
}
LINEAR = """
        self.head = nn.Linear(768, num_classes)

    def forward(self, x):
        logits = self.head(x.flatten(1))
        return """


def write(folder, body, head=HEAD):
    """Returns the name of a class Net with that body, in a file of a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(head + body)
    return f"{folder / 'net.py'}:Net"


@pytest.fixture
def net(tmp_path, monkeypatch):
    """net(body): such a name.  What the file imports is forgotten at the end of the test."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield lambda body, head=HEAD, folder=tmp_path: write(folder, body, head)
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, "__spec__", None)):
            del sys.modules[name]


def evaluate(*flags):
    try:
        return train_meta.main(["--evaluate", *map(str, flags)])
    except SystemExit as error:
        return error.code


# Files

SIMPLE = LINEAR + "logits\n"


def test_a_file_imports_its_neighbors_and_two_are_loaded_side_by_side(tmp_path, net):
    names = [net(SIMPLE + f"MARK = {i}\n", f"from near{i} import mark\n" + HEAD, tmp_path / str(i)) for i in range(2)]
    for i in range(2):
        (tmp_path / str(i) / f"near{i}.py").write_text(f"from tabnanny import value\nmark = value + {i}\n")
    (tmp_path / "0" / "tabnanny").mkdir()           # a name in the standard library, too
    (tmp_path / "0" / "tabnanny" / "__init__.py").write_text("value = 5\n")
    models = [build_model(name, 10) for name in names]
    found = [vars(sys.modules[type(model).__module__]) for model in models]
    assert [(module["MARK"], module["mark"]) for module in found] == [(0, 5), (1, 6)]
    assert build_model(names[0], 10) is not models[0] and sys.path.count(str(tmp_path / "0")) == 1


def test_a_changed_file_is_another_at_once_and_an_old_cache_is_not_read(tmp_path, net):
    name = net(SIMPLE + "MARK = 1\n")
    first = check_network(name)
    py_compile.compile(tmp_path / "net.py", invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    for mark in (1, 2):
        net(SIMPLE + f"MARK = {mark}\n")
        assert sys.modules[type(build_model(name, 10)).__module__].MARK == mark
        assert (check_network(name) == first) == (mark == 1)


def test_looking_at_a_file_executes_nothing_and_refuses_what_is_no_python(tmp_path, net):
    name = net("\n\nopen('executed', 'w').close()\nraise ValueError\n")
    assert len(check_network(name)) == 64 and not Path("executed").exists()
    assert check_network("convsmall") is None
    os.mkfifo(tmp_path / "fifo.py")
    for path, text, words in (("fifo.py", None, "cannot be read (not a regular file)"),
                              ("net.py", "a\0b", "is not Python ("), ("net.py", "(" * 99_999, "is not Python ("),
                              ("net.py", "class Nets: pass", None), ("net.py", "from x import *", None)):
        if text:
            (tmp_path / "net.py").write_text(text)
        if words is None:
            assert len(check_network(name)) == 64
            continue
        with pytest.raises(NetworkError) as error:
            check_network(f"{tmp_path / path}:Net")
        assert str(error.value).startswith(f"{tmp_path / path}:Net: its file {words}") and "\n" not in str(error.value)


@pytest.mark.parametrize(("path", "clashes"), [
    ("utils.py", True), ("models/blocks.py", True), ("metasemi/__init__.py", True), ("json.py", True),
    ("datasets/cifar.bin", False), ("metasemi.txt", False), ("losses.py", False)])
def test_a_neighbor_with_the_name_of_a_package_here_or_of_a_loaded_module_is_refused(tmp_path, net, monkeypatch, path, clashes):
    name, file = net(SIMPLE), tmp_path / path
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    for look in (check_network, lambda name: build_model(name, 10)) if clashes else ():
        with pytest.raises(NetworkError) as error:
            look(name)
        assert str(error.value).startswith(f"{name}: {tmp_path / Path(path).parts[0]} has the name of the module ")
        assert str(error.value).endswith(": rename it")
    monkeypatch.setattr(custom, "ROOT", tmp_path)       # as if this program were there
    assert path == "json.py" or len(check_network(name)) == 64


def test_a_neighbor_with_the_name_of_another_networks_neighbor_is_refused(tmp_path, net):
    names = [net(SIMPLE, "from layers import x\n" + HEAD, tmp_path / folder) for folder in ("a", "b")]
    for folder in ("a", "b"):
        (tmp_path / folder / "layers.py").write_text("x = 1\n")
    build_model(names[0], 10)
    with pytest.raises(NetworkError, match=r"b/layers.py has the name of the module .*a/layers.py: rename it"):
        build_model(names[1], 10)


# Networks

@pytest.mark.parametrize(("body", "flags"), [
    ("without batch norm, and with view", ["--mix-up"]), ("batch norm of its own, and dropout", ["--mix-up"]),
    ("frozen parameters", ["--mix-up"]), ("frozen parameters", ["--precision", "bfloat16"]), ("unused parameters", []),
    ("unused parameters", ["--meta-gradient", "unrolled"]), ("stochastic depth", ["--mix-up"])])
def test_an_ordinary_module_trains_resumes_bit_for_bit_and_is_evaluated(train, tmp_path, net, capsys, body, flags):
    flags = ["-a", net(NETWORKS[body]), *flags]
    assert train("whole", *flags) == 0
    assert train("parts", *flags, "--total-steps", "3") == 0 and train("parts", *flags, "--resume") == 0
    a, b = (tensors(torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)) for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) and a[key].isfinite().all() for key in a)
    torch.manual_seed(1)
    before = build_model(flags[1], 10).state_dict()
    fixed = {"stem.weight", "stem.bias", "unused.weight", "unused.bias"}
    assert all(torch.equal(value, a[f"/model/{key}"]) == (key in fixed) for key, value in before.items())
    capsys.readouterr()
    assert evaluate(tmp_path / "whole" / "checkpoint.pth", "-a", flags[1]) == 0
    error = float(re.search(r"error (\S+) %", capsys.readouterr().out)[1])
    assert error == json.loads((tmp_path / "whole" / "results.json").read_text())["error_rate"]["last"]


def test_a_network_that_fails_once_it_is_trained_is_one_line_with_the_place_in_the_file_or_beside_it(
        train, tmp_path, net, capsys):
    path, evaluation = tmp_path / "a" / "checkpoint.pth", tmp_path / "evaluation"
    (tmp_path / "helper.py").write_text("def fail(x):\n    return x.missing\n")
    name = net(LINEAR + f"""logits[len(x) > 8 and Path({str(evaluation)!r}).exists():]

    def features(self, x):
        return fail(x)
""", "from pathlib import Path\n\nfrom helper import fail\n" + HEAD)
    assert train("a", "-a", name, "--total-steps", "2") == 0
    evaluation.touch()
    assert evaluate(path, "-a", name) == 1
    with pytest.raises(SystemExit, match="1"):
        plot_features.main(["--checkpoint-path", str(path), "-a", name, "--method", "pca", "--num-point", "40",
                            "--save-path", str(tmp_path / "figure")])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "fails: ValueError: the model gives the shape (99, 10) for 100 examples" in lines[0], lines
    assert f"fails: {tmp_path / 'helper.py'}, line 2: AttributeError" in lines[1], lines
    assert not (tmp_path / "figure").exists()


def test_logits_of_a_custom_network_that_are_not_finite_are_one_line_with_the_step(train, tmp_path, net, capsys):
    name = net("""
        self.head = nn.Linear(768, num_classes)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += self.training
        return self.head(x.flatten(1)) / (1.0 if self.training or self.steps < 5 else 0.0)
""")
    assert train("a", "-a", name, "--no-meta") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{name} fails" not in error
    assert "the logits of 100 of 100 images are not finite in evaluation mode at step 6; " in error


def test_a_checkpoint_never_runs_a_file_and_a_changed_file_is_refused(train, tmp_path, net, capsys):
    marker = f"\n\nopen({str(tmp_path / 'executed')!r}, 'w').close()\n"
    name = net(NETWORKS["unused parameters"] + marker)
    assert train("a", "-a", name, "--total-steps", "3") == 0
    (tmp_path / "executed").unlink()
    saved = json.loads((tmp_path / "a" / "args.json").read_text())
    assert saved["args"]["arch"] == name and len(saved["files"]["arch"]) == 64
    path, figure = str(tmp_path / "a" / "checkpoint.pth"), tmp_path / "figure"

    def plot(*flags):
        with pytest.raises(SystemExit) as stop:
            plot_features.main(["--checkpoint-path", path, "--save-path", str(figure), "--method", "pca", *flags])
        return stop.value.code

    assert (evaluate(path), plot(), train("a", "--resume")) == (2, 2, 2)
    with pytest.raises(SystemExit, match="2"):
        train_meta.main(["--resume", str(tmp_path / "a"), "--total-steps", "4"])       # the folder knows its flags
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(name in line for line in errors)
    assert f"it runs only if you say -a {name}" in errors[0] and errors[0].partition(": ")[2] == errors[1].partition(": ")[2]
    assert f"{tmp_path / 'a'} was trained with {name}, which is code: it runs only if you say -a {name}" in errors[3]
    assert not (tmp_path / "executed").exists()
    assert plot("-a", name) == 2
    assert "has no features(x)" in capsys.readouterr().err

    (tmp_path / "executed").unlink()
    net(NETWORKS["unused parameters"] + marker + "# another comment\n")
    before = contents(tmp_path / "a")
    assert (evaluate(path, "-a", name), plot("-a", name), train("a", "-a", name, "--resume")) == (2, 2, 2)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all("has changed since" in line and saved["files"]["arch"] in line for line in errors)
    assert not (tmp_path / "executed").exists() and not figure.exists()
    assert contents(tmp_path / "a") == before


# Splits

def test_a_list_need_not_be_balanced_but_must_fit_the_data(train, tmp_path, capsys):
    labels, path = load_dataset("digits", ".").train_labels, tmp_path / "list.txt"
    labeled, rest = split_labels(labels, 40, 10, 1)
    uneven = [*labeled, *rest[:10]]
    for indices, message in (([*uneven[1:], 1297], "1297 is not the index of one of 1297 training images"),
                             ([i for i in range(600) if labels[i] != 3][:50], "it names no image of class 3: add one")):
        path.write_text("".join(f"{i}\n" for i in indices))
        assert train("a", "--split", str(path)) == 2
        assert f"--split: {message}" in capsys.readouterr().err and not (tmp_path / "a").exists()
    path.write_text("".join(f"{i}\n" for i in uneven))
    assert train("a", "--split", str(path)) == 0
    saved = torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)
    assert saved["labeled"].tolist() == sorted(uneven)


def test_validation_images_are_drawn_from_those_of_the_list_because_no_other_label_is_known():
    labels = torch.arange(3).repeat_interleave(10)
    given = [3, 1, 2, 0, 4, 29, 10, 11, 20, 21]
    labeled, validation = split_training(labels, None, 3, 3, seed=1, named=given)
    assert sorted([*labeled, *validation]) == sorted(given) and labels[validation].bincount().tolist() == [1, 1, 1]
    assert labeled.tolist() == sorted(labeled)
    for num_val in (6, 9):
        with pytest.raises(DataError, match=f"--num-val: {num_val} images cannot .*: use a multiple of 3 up to 3$"):
            split_training(labels, None, num_val, 3, seed=1, named=given)


@pytest.mark.parametrize("memory", [1000, 2 ** 30])
def test_a_list_of_file_names_with_or_without_class_numbers_is_that_of_their_indices(tmp_path, monkeypatch, capsys, memory):
    monkeypatch.setattr("utils.setup.memory_for_images", lambda device: memory)
    root = make_folder(tmp_path / "images", classes=("ant", "sea bee"), count=4)
    (root / "train" / "ant" / "01.png").rename(root / "train" / "ant" / "my 1.JPEG")         # after 00, 02 and 03
    texts = {"indices": "6\n0\n3\n5\n", "names": "./sea bee/02.png\nant/00.png\n\nant/my 1.JPEG \nsea bee/01.png",
             "published": "sea bee/02.png 1\nant/00.png 0\r\nant/my 1.JPEG\t17\nsea bee/01.png  1\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
        flags = [flag for flag in SHORT if flag not in ("--num-label", "50")]
        flags += ["--dataset", "folder", "--data-path", str(root), "--image-size", "16", "--num-workers", "0", "--num-val", "2",
                  "--split", str(tmp_path / f"{name}.txt"), "--save-path", str(tmp_path / name)]
        assert train_meta.main([*flags, "--total-steps", "4"]) == 0
        assert train_meta.main([*flags, "--resume"]) == 0
        assert differing(tmp_path / "indices", tmp_path / name) == []
    split = json.loads((tmp_path / "names" / "split.json").read_text())
    labeled = [int(line) for line in (tmp_path / "names" / "label_indices.txt").read_text().split()]
    assert sorted(labeled + split["validation"]) == [0, 3, 5, 6] and split["num_label"] == 2
    assert json.loads((tmp_path / "names" / "args.json").read_text())["args"]["num_label"] == 2
    (tmp_path / "published.txt").write_text("sea bee/02.png\nant/00.png\nant/my 1.JPEG\nsea bee/00.png\n")
    with pytest.raises(SystemExit, match="2"):
        train_meta.main([*flags, "--resume", "--total-steps", "9"])
    assert "--split: " in (error := capsys.readouterr().err) and "is not the split of the run that --resume continues" in error


@pytest.mark.parametrize(("text", "words"), [
    ("ant/00.png\nbee/9.png", "--split: there is no training image bee/9.png: write class/file"),
    ("ant/00.png\n3\n", "--split: there is no training image 3"), ("ant/00.png 0\nant/00.png\n", "names an image twice"),
    ("00.png\n", "'00.png' is not the index of an image nor class/file")])
def test_a_list_of_names_that_are_not_there_is_refused(train, tmp_path, capsys, text, words):
    root = make_folder(tmp_path / "images")
    (tmp_path / "list.txt").write_text(text)
    count = str(text.strip().count("\n") + 1)
    assert train("a", "--split", str(tmp_path / "list.txt"), "--dataset", "folder", "--data-path", str(root), "--num-label",
                 count) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "a").exists()


# The documents

def section(title):
    """The section of the README, if it has one, and that of docs/usage.md."""
    text = "".join(path.read_text() for path in (ROOT / "README.md", ROOT / "docs" / "usage.md"))
    return "".join(re.findall(rf"^##+ {title}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))


def run_commands(title, *data):
    """Runs the commands of a section as they stand, in the working folder, with flags at the end that shorten them; those
    that train are given the flags `data` too.  Returns their number."""
    commands = [shlex.split(line)[1:] for line in section(title).splitlines() if line.startswith("    python3 ")]
    for script, *words in commands:
        if script == "plot_features.py":
            short = ["--method", "pca"]
        elif "--evaluate" in words:
            short = []
        else:
            short = ["--total-steps", "2", "--batch-size", "4", "--warmup", "1", *data,
                     *([] if "--split" in words or "photos-unlabeled" in words else ["--num-label", "6"])]
        main = {"train_meta.py": train_meta.main, "plot_features.py": plot_features.main}[script]
        assert main([*words, *short, "--num-workers", "0"]) == 0, words
    return len(commands)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_folder(tmp_path / "photos", count=6)


def test_the_documents_take_a_folder_of_images_to_a_trained_model(photos):
    (photos.parent / "labeled.txt").write_text("7\n0\n3\n")
    make_folder(photos.parent / "photos-unlabeled")
    make_folder(photos.parent / "photos-unlabeled" / "unlabeled")
    make_folder(photos.parent / "new-photos")
    (photos.parent / "new-photos" / "train").rename(photos.parent / "new-photos" / "more")
    shutil.rmtree(photos.parent / "new-photos" / "test")
    assert run_commands("Your own images") == 6
    results = photos.parent / "results"
    assert json.loads((results / "photos" / "results.json").read_text())["steps"] == 2
    assert (results / "new-photos.csv").read_text().count("new-photos/more/ant/") == 6
    assert (results / "photos.csv").read_text().count("photos/test/bee/") == 6
    assert (results / "photos-figure" / "features.png").exists()
    assert (results / "photos-split" / "label_indices.txt").read_text() == "0\n3\n7\n"


def test_the_documents_take_a_network_of_the_users_own_to_a_trained_model(photos):
    text = section("Your own network").split("```python\n")[1].split("```")[0]
    (photos.parent / "net.py").write_text(text)
    assert run_commands("Your own network", "--dataset", "folder", "--data-path", "photos") == 3
    assert (photos.parent / "results" / "net-figure" / "features.png").exists()
    assert torch.load(photos.parent / "results" / "net" / "checkpoint.pth", weights_only=True)["step"] == 2
