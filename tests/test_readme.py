"""The README's commands, run as they stand in it, with flags behind them that make them short."""
import json
import os
import re
import shlex
import subprocess
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

import pytest
import torch
from conftest import ROOT
from injections import run

import plot_features
import reproduce
import train_meta

README = (ROOT / "README.md").read_text()
DIGITS = ["--dataset", "digits", "-a", "convsmall"]
SHORT = {
    "train_meta.py": [*DIGITS, "--num-label", "50", "--batch-size", "8", "--total-steps", "2", "--warmup", "1",
                      "--device", "cpu"],
    "plot_features.py": ["--method", "pca", "--num-point", "40", "--device", "cpu"],
    "reproduce.py": ["--dataset", "digits", "--scale", "0.005", "--seeds", "1"],
}


def commands(section):
    """(script, flags) of the lines of a section that run one of the three scripts."""
    text = re.search(rf"^## {section}\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)[1]
    lines = [shlex.split(line) for line in text.splitlines() if re.match(r"    (\w+=\w+ )?python3 ", line)]
    return [(words[words.index("python3") + 1], words[words.index("python3") + 2:]) for words in lines]


def make(*targets):
    """The commands of `make`, as (script, flags)."""
    lines = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = [shlex.split(line) for line in lines.replace("\\\n", " ").splitlines() if "/python reproduce.py" in line]
    return [("reproduce.py", line[2:]) for line in words]


def test_training_plotting_and_evaluating_as_the_readme_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = []
    for script, flags in [*commands("Commands"), *commands("Evaluation")]:
        if script == "reproduce.py":
            continue
        done.append(script)
        extra = [] if "--curves" in flags else SHORT[script]
        if "--evaluate" in flags:
            extra = [*(DIGITS if "weights.pth" in flags else []), "--device", "cpu"]
            torch.save(torch.load("results/cifar10/checkpoint.pth", weights_only=True)["model"], "weights.pth")
        elif "--checkpoint-path" in flags:
            extra = [*extra, "--dataset", "digits"]
        main = train_meta.main if script == "train_meta.py" else plot_features.main
        assert main([*flags, *extra]) == 0, flags
        if "--save-path" in flags:
            assert (tmp_path / flags[flags.index("--save-path") + 1]).is_dir()
    assert done.count("train_meta.py") == 9 and done.count("plot_features.py") == 3
    flags = json.loads((tmp_path / "results" / "svhn" / "args.json").read_text())["args"]
    assert (flags["alpha"], flags["weight_decay"], flags["seed"]) == (0.1, 5e-5, 7788)           # those of the command
    assert (tmp_path / "results" / "curves" / "curves.png").exists() and (tmp_path / "cifar10.csv").exists()
    assert capsys.readouterr().out.count("confusion matrix") == 2


ONE_AT_A_TIME = Lock()          # multiprocessing may lose an exit code if two threads wait


def in_a_process_that_has_torch(command, **options):
    """subprocess.run for a script of this checkout, without loading torch once more."""
    with ONE_AT_A_TIME, TemporaryDirectory() as folder:
        code, out, error = run(Path(folder), command[2:], partial(os.chdir, os.getcwd()), script=Path(command[1]).stem)
    return subprocess.CompletedProcess(command, code, out, error)


def test_reproducing_as_the_readme_and_make_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan = [*commands("Commands"), *make("demo", "reproduce-small")]
    plan = [flags for script, flags in plan if script == "reproduce.py"]
    assert [flags[0] for flags in plan] == ["main", "ablation", "figure3", "curves", "figure3", "ablation"]
    (tmp_path / "README.md").write_text(README)
    del plan[4]                                             # that of `make demo`, shortened, is the one before
    monkeypatch.setattr(subprocess, "run", in_a_process_that_has_torch)
    for flags in plan:
        flags = [*flags, *SHORT["reproduce.py"], *(["--gpus", "0", "0"] if "--gpus" in flags else ["--jobs", "2"])]
        assert (reproduce.main(flags), capsys.readouterr().err) == (0, ""), flags
    folder = tmp_path / "results" / "reproduce" / "digits-0.005"
    assert {path.name for path in folder.iterdir()} == {
        "both-1", "supervised-1", "neither-1", "meta-1", "mix-up-1", "beta-0-1", "features.png", "features.pdf",
        "embedding.npz", "embedding.json", "curves.png", "curves.pdf"}
    assert "| seed 1 |" in (tmp_path / "README.md").read_text()
    assert {path.name for path in (tmp_path / "splits").iterdir()} == {"SHA256SUMS", "digits-50-seed1.txt"}


@pytest.mark.parametrize("target", ["test", "torture", "benchmark-gpu"])
def test_make_runs_scripts_that_are_there(target):
    lines = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    scripts = re.findall(r"/python ([\w/]+\.py)", lines)
    assert scripts or "pytest" in lines
    assert all((ROOT / script).exists() for script in scripts) and f"make {target}" in README
