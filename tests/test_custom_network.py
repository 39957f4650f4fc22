"""The user's own images, network and list of labeled images."""
import importlib.util
import json
import py_compile
import re
import shlex
import shutil
import sys

import pytest
import torch
from conftest import ROOT, SHORT
from helpers import differing, tensors
from test_datasets import make_folder

import plot_features
import train_meta
from datasets import DataError, load_dataset
from datasets.splits import split_labels, split_training
from metasemi import meta_gradient
from models import NetworkError, build_model, check_network, dry_run

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
    "unused parameters": """
        self.unused, self.head = nn.Linear(7, 7), nn.Linear(768, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1))
""",
}
SQUARE = """
        self.head = nn.Linear(768, num_classes)

    def forward(self, x):
        return Square.apply(self.head(x.flatten(1)))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]
"""
LINEAR = """
        self.head = nn.Linear(768, num_classes)

    def forward(self, x):
        logits = self.head(x.flatten(1))
        return """


@pytest.fixture
def net(tmp_path):
    """net(body): the name of a class Net with that body, in a file."""
    def write(body, head=HEAD):
        (tmp_path / "net.py").write_text(head + body)
        return f"{tmp_path / 'net.py'}:Net"
    return write


def evaluate(*flags):
    try:
        return train_meta.main(["--evaluate", *map(str, flags)])
    except SystemExit as error:
        return error.code


# Networks

@pytest.mark.parametrize(("body", "flags"), [
    ("without batch norm, and with view", ["--mix-up"]), ("batch norm of its own, and dropout", ["--mix-up"]),
    ("frozen parameters", ["--mix-up"]), ("frozen parameters", ["--precision", "bfloat16"]), ("unused parameters", []),
    ("unused parameters", ["--meta-gradient", "unrolled"])])
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


def test_a_network_without_forward_mode_derivative_is_told_the_remedy_and_it_works(train, tmp_path, net, capsys):
    name = net(SQUARE)
    assert train("a", "-a", name) == 2
    error = capsys.readouterr().err
    assert "take --meta-gradient finite-difference" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["net.py"]
    assert train("a", "-a", name, "--meta-gradient", "finite-difference") == 0
    assert train("b", "-a", name, "--no-meta") == 0


@pytest.mark.parametrize(("body", "message"), [
    (LINEAR + "logits[:, 1:]", "gives shape (4, 9) in evaluation mode for 4 images: expected logits of shape (4, 10)"),
    (LINEAR + "(logits,)", "gives a tuple in evaluation mode"),
    (LINEAR + "logits[:, 0] if self.training else logits", "gives shape (4,) in training mode"),
    (LINEAR + "self.head(x)", "line 13: RuntimeError"),
    (LINEAR + "logits.detach()", "depend on no parameter that can be trained"),
    ("\n    def forward(self, x):\n        return x\n", "has no parameter that can be trained"),
    ("        self.head = nn.LazyLinear(num_classes)\n", "has lazy layers"),
    ("        raise RuntimeError('two\\nlines')\n", "line 8: RuntimeError: two"),
    ("        exit(0)\n", "SystemExit: 0"),
    ("\n\ndef Net(num_classes):\n    return 7\n", "made a int: expected a torch.nn.Module"),
    ("\n\nimport nothing_of_this\n", "ModuleNotFoundError: No module named 'nothing_of_this'"),
    ("\n\ndel Net\n", "has no attribute 'Net'")])
def test_a_network_that_cannot_be_trained_is_one_line_and_writes_nothing(train, tmp_path, net, capsys, body, message):
    assert train("a", "-a", net(body)) == 2
    error = capsys.readouterr().err
    assert message in error and "net.py" in error and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["net.py"]


@pytest.mark.parametrize(("body", "message"), [
    ("        self.head = nn.Linear(768, num_classes, dtype=torch.complex64)\n", "has the complex parameter head.weight"),
    ("        self.w = nn.Parameter(torch.eye(3).to_sparse())\n", "has the sparse parameter w"),
    (LINEAR + "logits\n\n    def get_extra_state(self):\n        return {'n': 1}\n", "has the extra state _extra_state, a"),
    (LINEAR.replace("x.flatten(1)", "x.relu_().flatten(1)") + "logits\n", "changes its input in evaluation mode"),
    (LINEAR.replace("nn.Linear(768, num_classes)", "nn.Embedding(4, num_classes, sparse=True)").replace(
        "x.flatten(1)", "(x.flatten(1)[:, 0] > 0).long()") + "logits\n", "gives head.weight a sparse gradient"),
    (LINEAR.replace("nn.Linear(768, num_classes)", "nn.utils.parametrizations.weight_norm(nn.Linear(768, num_classes))")
     + "logits\n", "does not support it because it has not been implemented yet.): take --meta-gradient finite-difference")])
def test_a_network_that_would_train_wrong_or_fail_later_is_refused_in_its_dry_run(net, body, message):
    with pytest.raises(NetworkError) as error:
        dry_run(net(body), 10, 16, torch.device("cpu"), meta_gradient=meta_gradient)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_batch_normalization_over_one_value_is_refused_for_every_network(net):
    for name in (net(NETWORKS["batch norm of its own, and dropout"]), "resnet18"):
        with pytest.raises(NetworkError, match="more than 1 value per channel .*: take a larger --batch-size"):
            dry_run(name, 10, 16, torch.device("cpu"), batch=1)
    assert dry_run("convsmall", 10, 16, torch.device("cpu"), batch=1) == []


def test_probabilities_in_the_place_of_logits_are_one_warning(net):
    for body, mode in ((LINEAR + "logits.softmax(dim=1)\n", "in evaluation mode"),
                       (LINEAR + "logits if not self.training else logits.softmax(dim=1)\n", "in training mode"),
                       (LINEAR + "logits\n", None)):
        lines = dry_run(net(body), 10, 16, torch.device("cpu"), meta_gradient=meta_gradient)
        assert len(lines) == (mode is not None) and all(f"gives probabilities {mode}" in line for line in lines)


def test_a_file_imports_its_neighbors_without_a_cache_and_its_sum_covers_them(tmp_path, monkeypatch):
    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    ours, executed = dict(sys.modules), tmp_path / "executed"
    mark = f"open({str(executed)!r}, 'w').close()\n"
    write("net.py", mark + "import utils\nfrom parts import Body as Imported\nAlias = utils.Net\n")
    write("utils.py", "from torch import nn\nfrom folder.blocks import head\n\n\nclass Net(nn.Module):\n"
          "    def __init__(self, num_classes):\n        super().__init__()\n        self.head = head(num_classes)\n\n"
          "    def forward(self, x):\n        return self.head(x)\n")
    write("parts/__init__.py", "from .body import *\n")
    write("parts/body.py", "from utils import Net\n\n\nclass Body(Net):\n    pass\n")
    write("folder/blocks.py", "from torch import nn\n\n\ndef head(k):\n"
          "    return nn.Sequential(nn.Flatten(), nn.Linear(768, k))\n")
    write("unrelated.py", "1 +\n")
    write("evil.py", "raise RuntimeError('an old cache was run')\n")
    py_compile.compile(tmp_path / "evil.py", importlib.util.cache_from_source(tmp_path / "utils.py"),
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "net.py", "net.py"):
        for name in (f"{path}:Alias", f"{path}:Imported"):
            before, first = sorted(tmp_path.rglob("*")), check_network(name)
            assert sorted(tmp_path.rglob("*")) == before and not executed.exists()
            assert build_model(name, 10)(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
            executed.unlink()
            assert sorted(tmp_path.rglob("*")) == before
            assert {name: module for name, module in sys.modules.items() if name in ours} == ours
    sums = {first}
    for file in ("net.py", "utils.py", "parts/__init__.py", "parts/body.py", "folder/blocks.py"):
        write(file, (tmp_path / file).read_text() + "# changed\n")
        sums.add(check_network("net.py:Imported"))
    write("unrelated.py", "changed")
    assert len(sums) == 6 and check_network("net.py:Imported") in sums
    for name, text, message in (("net.py:Missing", None, "net.py defines no class Missing"),
                                ("net.py:Imported", "def", "body.py is not Python")):
        if text:
            write("parts/body.py", text)
        with pytest.raises(NetworkError, match=message):
            check_network(name)


FAILING = """
        self.head, self.calls = nn.Linear(768, num_classes), 0
        self.register_buffer("mask", torch.full((1, num_classes), -torch.inf).triu(1))

    def forward(self, x):
        self.calls += self.training
        return check(self, x, self.head(x.flatten(1)) + self.mask.exp())
"""


def test_a_network_that_fails_in_use_is_one_line_with_place_and_step_and_an_infinite_buffer_is_no_failure(
        train, tmp_path, net, capsys):
    helper = tmp_path / "helper.py"
    helper.write_text(f"""from pathlib import Path


def check(net, x, logits):
    if net.calls == 9 and Path({str(tmp_path / 'training')!r}).exists():
        raise ValueError('two\\nlines')
    if len(x) > 4 and not net.training and Path({str(tmp_path / 'evaluation')!r}).exists():
        return logits[1:]
    return logits
""")
    name = net(FAILING + "\n    def features(self, x):\n        return x.missing\n", HEAD.replace(
        "import torch\n", "import torch\nfrom helper import check\n"))
    (tmp_path / "training").touch()
    assert train("a", "-a", name) == 1
    error = capsys.readouterr().err
    assert error == (f"train_meta.py: {name} fails at step 5: {helper}, line 6: ValueError: two; "
                     f"{tmp_path / 'a' / 'checkpoint.pth'} of step 3 is intact\n")
    (tmp_path / "training").unlink()
    assert train("a", "-a", name, "--resume") == 0
    assert evaluate(tmp_path / "a" / "checkpoint.pth", "-a", name) == 0
    (tmp_path / "evaluation").touch()
    capsys.readouterr()
    assert evaluate(tmp_path / "a" / "checkpoint.pth", "-a", name) == 1
    with pytest.raises(SystemExit, match="1"):
        plot_features.main(["--checkpoint-path", str(tmp_path / "a" / "checkpoint.pth"), "-a", name, "--method", "pca",
                            "--save-path", str(tmp_path / "figure"), "--num-point", "40"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "fails: ValueError: 99 rows of logits for 100 images" in lines[0], lines
    assert f"fails: {tmp_path / 'net.py'}, line 18: AttributeError" in lines[1], lines
    assert not (tmp_path / "figure").exists()


def test_logits_of_a_custom_network_that_are_not_finite_are_one_line_with_the_step(train, tmp_path, net, capsys):
    name = net("""
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(768, num_classes)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += self.training
        return self.head(x.flatten(1)) / (1.0 if self.training or self.steps < 5 else 0.0)
""")
    assert train("a", "-a", name, "--no-meta") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "NetworkFailure" not in error and f"{name} fails" not in error
    assert "the logits of 100 of 100 images are not finite in evaluation mode at step 6; " in error
    saved = torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)
    assert saved["step"] == 3
    saved["model"]["steps"].fill_(9)
    torch.save(saved, tmp_path / "spoiled.pth")
    assert evaluate(tmp_path / "spoiled.pth", "-a", name) == 2
    assert "spoiled.pth: the logits of 100 of 100 images are not finite" in capsys.readouterr().err


def test_a_network_that_fails_on_its_labeled_images_at_the_end_is_one_line_with_the_step(train, tmp_path, net, capsys):
    name = net("""
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(768, num_classes)

    def forward(self, x):
        if len(x) == 50:
            raise ValueError("fifty")
        return self.head(x.flatten(1))
""")
    assert train("a", "-a", name, "--no-meta") == 1
    assert capsys.readouterr().err == (f"train_meta.py: {name} fails at step 7: {tmp_path / 'net.py'}, line 15: "
                                       f"ValueError: fifty; {tmp_path / 'a' / 'checkpoint.pth'} of step 7 is intact\n")


def test_a_dry_run_leaves_the_random_state_as_it_was(net):
    state = torch.get_rng_state()
    dry_run(net(NETWORKS["batch norm of its own, and dropout"]), 10, 16, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(NetworkError, match="no network is named 'resnet'"):
        build_model("resnet", 10)


def test_a_checkpoint_never_runs_a_file_and_a_changed_file_is_refused(train, tmp_path, net, capsys):
    marker = f"\n\nopen({str(tmp_path / 'executed')!r}, 'w').close()\n"
    name = net(NETWORKS["unused parameters"] + marker)
    assert train("a", "-a", name, "--total-steps", "3") == 0
    (tmp_path / "executed").unlink()
    saved = json.loads((tmp_path / "a" / "args.json").read_text())["args"]
    assert saved["arch"] == name and len(saved["arch_sha256"]) == 64
    path = str(tmp_path / "a" / "checkpoint.pth")
    figure = ["--checkpoint-path", path, "--save-path", str(tmp_path / "figure"), "--method", "pca", "--num-point", "40"]

    def plot(*flags):
        with pytest.raises(SystemExit) as stop:
            plot_features.main([*figure, *flags])
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
    before = {file: file.read_bytes() for file in (tmp_path / "a").iterdir() if file.name != ".lock"}
    assert (evaluate(path, "-a", name), plot("-a", name), train("a", "-a", name, "--resume")) == (2, 2, 2)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all("has changed since" in line and saved["arch_sha256"] in line for line in errors)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "figure").exists()
    assert {file: file.read_bytes() for file in before} == before


# Splits

def test_a_runs_own_list_trains_bit_for_bit_the_same_in_any_order_and_resumes(train, tmp_path):
    flags = ["--mix-up"]
    assert train("a", *flags) == 0
    indices = (tmp_path / "a" / "label_indices.txt").read_text().split()
    (tmp_path / "list.txt").write_text("\n".join(reversed(indices)))
    given = [flag for flag in SHORT if flag not in ("--num-label", "50")]       # the list says how many
    given += [*flags, "--split", str(tmp_path / "list.txt"), "--save-path", str(tmp_path / "b")]
    assert train_meta.main([*given, "--total-steps", "4"]) == 0
    assert train_meta.main([*given, "--resume"]) == 0
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert (tmp_path / "b" / "label_indices.txt").read_text() == (tmp_path / "a" / "label_indices.txt").read_text()
    args = json.loads((tmp_path / "b" / "args.json").read_text())["args"]
    assert args["split"] == str(tmp_path / "list.txt") and args["num_label"] == 50


def test_a_list_that_changed_is_not_resumed(train, tmp_path, capsys):
    _, rest = split_labels(load_dataset("digits", ".").train_labels, 50, 10, 1)
    path = tmp_path / "list.txt"
    for part in (slice(0, 50), slice(1, 51)):
        path.write_text("".join(f"{i}\n" for i in rest[part]))
        code = train("a", "--split", str(path), "--total-steps", "9", *(["--resume"] if part.start else []))
        assert code == (2 if part.start else 0)
    assert f"--split: {path} is not the split of the run that --resume continues" in capsys.readouterr().err


def test_a_list_need_not_be_balanced_but_must_fit_the_data(train, tmp_path, capsys):
    labels = load_dataset("digits", ".").train_labels
    labeled, rest = split_labels(labels, 40, 10, 1)
    uneven = [*labeled, *rest[:10]]
    no_three = [i for i in range(600) if labels[i] != 3][:50]
    for name, indices, message in (("uneven", uneven, None),
                                   ("far", [*uneven[1:], 1297], "1297 is not the index of one of 1297 training images"),
                                   ("classless", no_three, "it names no image of class 3: add one")):
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(f"{i}\n" for i in indices))
        assert train(name, "--split", str(path)) == (2 if message else 0)
        assert message is None or f"--split: {message}" in capsys.readouterr().err
        assert (tmp_path / name).exists() == (message is None)
    saved = torch.load(tmp_path / "uneven" / "checkpoint.pth", weights_only=True)
    assert saved["labeled"].tolist() == sorted(uneven)


def test_validation_images_are_drawn_from_those_of_the_list_because_no_other_label_is_known():
    labels = torch.arange(3).repeat_interleave(10)
    given = [3, 1, 2, 0, 4, 29, 10, 11, 20, 21]
    labeled, validation = split_training(labels, None, 3, 3, seed=1, given=given)
    assert sorted([*labeled, *validation]) == sorted(given) and labels[validation].bincount().tolist() == [1, 1, 1]
    assert labeled.tolist() == sorted(labeled)
    with pytest.raises(DataError, match="need 3 images of class 1, which has 2: use at most 6"):
        split_training(labels, None, 9, 3, seed=1, given=given)
    with pytest.raises(DataError, match="it names no image of class 1 beside the 6 of --num-val: add one"):
        split_training(labels, None, 6, 3, seed=1, given=given)


@pytest.mark.parametrize("memory", [1000, 2 ** 30])
def test_a_list_of_file_names_with_or_without_class_numbers_is_that_of_their_indices(tmp_path, monkeypatch, capsys, memory):
    monkeypatch.setattr("utils.state.memory_for_images", lambda device: memory)
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


def test_the_evaluations_of_the_documents_are_the_flags_that_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in section("Evaluation").splitlines():
        if line.startswith("    python3 "):
            assert evaluate(*shlex.split(line)[3:]) == 2
            assert capsys.readouterr().err.endswith(".pth does not exist: give a checkpoint or a state dict\n")
