"""--init: a run that starts from given weights, and weights that do not fit."""
import json
import shlex
from argparse import Namespace

import pytest
import torch
from helpers import state_of
from test_custom_network import section
from test_datasets import make_folder
from torchvision.models import resnet18

import train_meta
from models import build_model
from utils.errors import UsageError
from utils.setup import load_first_weights


def test_a_run_starts_from_given_weights_keeps_their_sum_and_is_not_resumed_with_others(train, tmp_path, capsys):
    path = tmp_path / "w.pth"
    torch.manual_seed(5)
    given = build_model("convsmall", 10).state_dict()
    torch.save(given, path)
    still = ["--init", str(path), "--lr", "1e-30", "--weight-decay", "0"]
    assert train("a", *still, "--total-steps", "2") == 0
    found = state_of(tmp_path / "a")["model"]
    assert all(torch.equal(found[name], given[name]) for name in ("classifier.weight", "classifier.bias"))
    assert len(json.loads((tmp_path / "a" / "args.json").read_text())["files"]["init"]) == 64
    assert train("a", *still, "--total-steps", "4", "--resume") == 0
    assert train("b", "--init", str(tmp_path / "a" / "checkpoint.pth"), "--total-steps", "1", "--lr", "1e-30") == 0
    capsys.readouterr()
    torch.save({**given, "classifier.bias": given["classifier.bias"] + 1}, path)
    assert train("a", *still, "--total-steps", "6", "--resume") == 2
    assert "--resume continues: restore its file, which has changed since (SHA-256), or" in capsys.readouterr().err
    assert state_of(tmp_path / "a")["step"] == 4


def test_weights_that_do_not_fit_are_refused_with_their_names(train, tmp_path, capsys):
    given = build_model("convsmall", 10).state_dict()
    nan = given["classifier.bias"] * float("nan")
    for name, weights, words in (
            ("classes", build_model("convsmall", 7).state_dict(), "size mismatch for classifier.weight"),
            ("lacks", {k: w for k, w in given.items() if k != "classifier.bias"}, 'Missing key(s) in state_dict: "class'),
            ("more", {**given, "head.weight": given["classifier.bias"]}, 'Unexpected key(s) in state_dict: "head.weight"'),
            ("other", build_model("resnet18", 10).state_dict(), "do not fit convsmall (Error(s) in loading state_dict"),
            ("nan", {**given, "classifier.bias": nan}, "its weights are not finite"),
            ("text", "weights", "neither a state dict nor a checkpoint"),
            ("none", None, "none.pth cannot be read (No such file or directory): restore it, or give another")):
        if weights:
            torch.save(weights, tmp_path / f"{name}.pth")
        assert train("a", "--init", str(tmp_path / f"{name}.pth")) == 2
        error = capsys.readouterr().err
        assert words in error and f"{name}.pth" in error and error.count("\n") == 1, error
    assert not (tmp_path / "a").exists()


def test_torchvisions_weights_start_all_but_a_last_layer_for_other_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos")
    given = resnet18(num_classes=1000).state_dict()
    torch.save(given, "resnet18.pth")
    line, = (line for line in section("Start from given weights").splitlines() if line.startswith("    python3 "))
    assert train_meta.main([*shlex.split(line)[2:], "--num-label", "4", "--total-steps", "1", "--batch-size", "4",
                            "--warmup", "1", "--lr", "1e-30", "--image-size", "32", "--weight-decay", "0"]) == 0
    found = state_of(tmp_path / "results" / "photos-init")["model"]
    assert found["fc.weight"].shape == (2, 512)
    assert all(torch.equal(found[name], given[name]) for name in found if name.endswith("weight") and "fc" not in name)
    line = "resnet18.pth: its last layer, fc, is for 1,000 classes: that for 2 starts at random"
    assert line in (tmp_path / "results" / "photos-init" / "log.txt").read_text()


def test_a_last_layer_of_the_same_number_of_classes_is_taken_and_old_files_without_counters_are(tmp_path):
    given = {name: w for name, w in resnet18(num_classes=4).state_dict().items() if "num_batches" not in name}
    torch.save(given, tmp_path / "w.pth")
    model, args = build_model("resnet18", 4), Namespace(arch="resnet18", init=tmp_path / "w.pth")
    assert load_first_weights(model, args) == []
    assert all(torch.equal(model.state_dict()[name], w) for name, w in given.items())
    torch.save({**given, "fc.weight": torch.zeros(4, 9)}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="size mismatch for fc.weight"):
        load_first_weights(model, args)
