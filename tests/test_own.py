"""The user's own images, network and list of labeled images."""
import json
import re
import shlex

import pytest
import torch
from conftest import ROOT, SHORT
from injections import differing, tensors
from test_datasets import make_folder

import plot_features
import train_meta
from datasets import DataError, load_dataset
from datasets.splits import split_labels, split_training
from models import NetworkError, build_model, rehearse

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


def test_a_rehearsal_leaves_the_random_state_as_it_was(net):
    state = torch.get_rng_state()
    rehearse(net(NETWORKS["batch norm of its own, and dropout"]), 10, 16, torch.device("cpu"))
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
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(name in line for line in errors)
    assert f"it runs only if you say -a {name}" in errors[0] and errors[0].partition(": ")[2] == errors[1].partition(": ")[2]
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
    flags = ["--num-val", "20", "--mix-up"]
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


def test_validation_images_are_never_among_those_of_the_list():
    labels = torch.arange(3).repeat_interleave(10)
    given = [0, 1, 2, 3, 4, 5, 10, 20]
    labeled, validation = split_training(labels, 8, 12, 3, seed=1, given=given)
    assert labeled.tolist() == given and len(validation) == 12 and not set(validation) & set(given)
    assert labels[validation].bincount().tolist() == [4, 4, 4]
    with pytest.raises(DataError, match="need 5 images of class 0, which has 4: use at most 12"):
        split_training(labels, 8, 15, 3, seed=1, given=given)


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
                     *([] if "--split" in words else ["--num-label", "6"])]
        main = {"train_meta.py": train_meta.main, "plot_features.py": plot_features.main}[script]
        assert main([*words, *short, "--num-workers", "0"]) == 0, words
    return len(commands)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_folder(tmp_path / "photos", count=6)


def test_the_documents_take_a_folder_of_images_to_a_trained_model(photos):
    (photos.parent / "labeled.txt").write_text("7\n0\n3\n")
    assert run_commands("Your own images") == 4
    results = photos.parent / "results"
    assert json.loads((results / "photos" / "results.json").read_text())["steps"] == 2
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
