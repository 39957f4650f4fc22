"""README.md, docs/ and docker/README.md: their commands run as they stand, with flags behind them that make them short."""
import csv
import json
import os
import re
import shlex
import subprocess
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from conftest import ROOT
from helpers import start
from injections import INJECTIONS
from oracle import close
from test_datasets import make_folder

import plot_features
import reproduce
import train_meta
from metasemi import training_step
from models import build_model
from utils.experiment import resolve_flags
from utils.flags import training_parser

TEXTS = {str(path.relative_to(ROOT)): path.read_text()
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docker" / "README.md")}
DIGITS = ["--dataset", "digits", "-a", "convsmall"]
SHORT = {
    "train_meta.py": [*DIGITS, "--num-label", "50", "--batch-size", "8", "--warmup", "1", "--device", "cpu"],
    "plot_features.py": ["--dataset", "digits", "--method", "pca", "--num-point", "40", "--device", "cpu"],
    "reproduce.py": ["--dataset", "digits", "--scale", "0.005", "--seeds", "1"],
}


def lines_of(text):
    """The commands of a text: its indented lines, and those within a sentence that run Python."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*re.findall(r"^    ([^\s#].*)$", text, re.MULTILINE), *re.findall(r"`(python3 [^`]*)`", text)]


def words_of(line):
    """(script, flags) of a line that runs Python or torchrun, else None."""
    match = re.search(r"(?:python3|torchrun .*?) ?\b([\w/]+\.py)\b(.*)", line)
    return match and (match[1], shlex.split(match[2]))


def commands(file, section):
    """(script, flags) of the indented lines of a section, its subsections left out."""
    text = re.search(rf"^##+ {section}\n(.*?)(?=^##|\Z)", TEXTS[file], re.MULTILINE | re.DOTALL)[1]
    return [words_of(line) for line in lines_of(text) if not line.startswith("make ")]


def make(*targets):
    """The commands of `make`, as (script, flags)."""
    lines = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = [shlex.split(line) for line in lines.replace("\\\n", " ").splitlines() if "/python reproduce.py" in line]
    return [("reproduce.py", line[2:]) for line in words]


def test_training_plotting_and_evaluating_as_the_documents_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = []
    for script, flags in [*commands("README.md", "Four commands"), *commands("docs/usage.md", "The tables of the paper"),
                          *commands("docs/usage.md", "Figures"), *commands("docs/usage.md", "Evaluation")]:
        if script == "reproduce.py":
            continue
        done.append(script)
        extra = [] if "--curves" in flags else SHORT[script]
        if "--evaluate" in flags:
            extra = [*(DIGITS if "weights.pth" in flags else []), "--device", "cpu"]
            torch.save(torch.load("results/cifar10/checkpoint.pth", weights_only=True)["model"], "weights.pth")
        elif script == "train_meta.py":
            extra = [*extra, "--total-steps", "3" if "--resume" in flags else "2"]
        elif "--curves" in flags:
            extra = extra[2:]
        main = train_meta.main if script == "train_meta.py" else plot_features.main
        assert main([*flags, *extra]) == 0, flags
        if "--save-path" in flags:
            assert (tmp_path / flags[flags.index("--save-path") + 1]).is_dir()
    assert done.count("train_meta.py") == 10 and done.count("plot_features.py") == 4
    flags = json.loads((tmp_path / "results" / "svhn" / "args.json").read_text())["args"]
    assert (flags["alpha"], flags["weight_decay"], flags["seed"]) == (0.1, 5e-5, 7788)           # those of the command
    assert "resumed at step 2" in (tmp_path / "results" / "cifar10" / "log.txt").read_text()
    assert (tmp_path / "cifar10.csv").exists() and capsys.readouterr().out.count("confusion matrix") == 2


class Forked:
    """subprocess.Popen for a script of this checkout, without loading torch once more."""

    def __init__(self, command, **options):
        self.folder = TemporaryDirectory()
        self.process = start(command[2:], partial(os.chdir, os.getcwd()), script=Path(command[1]).stem,
                             output=Path(self.folder.name, "output"))

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)


def test_reproducing_as_the_documents_and_make_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan = [*commands("docs/usage.md", "The tables of the paper"), *make("demo", "reproduce-small")]
    plan = [flags for script, flags in plan if script == "reproduce.py"]
    assert [flags[0] for flags in plan] == ["main", "ablation", "figure3", "curves", "figure3", "ablation"]
    for name in ("README.md", "REPRODUCTION.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    del plan[4]                                             # that of `make demo`, shortened, is the one before
    monkeypatch.setattr(subprocess, "Popen", Forked)
    for flags in plan:
        flags = [*flags, *SHORT["reproduce.py"], *(["--gpus", "0", "0"] if "--gpus" in flags else ["--jobs", "2"])]
        assert (reproduce.main(flags), capsys.readouterr().err) == (0, ""), flags
    assert (tmp_path / "splits" / "digits-50-seed1.txt").exists()
    folder = tmp_path / "results" / "reproduce" / "digits-0.005"
    assert {path.name for path in folder.iterdir()} == {
        "both-1", "supervised-1", "neither-1", "meta-1", "mix-up-1", "beta-0-1", "features.png", "features.pdf",
        "embedding.npz", "embedding.json", "curves.png", "curves.pdf", "curves.csv"}
    assert "Not run yet." in (tmp_path / "README.md").read_text()       # its table is of another cell
    assert "| row | n | last |" in (tmp_path / "REPRODUCTION.md").read_text()


def block(words):
    """The one program of docs/usage.md that holds some words."""
    found, = (text for text in re.findall(r"```python\n(.*?)```", TEXTS["docs/usage.md"], re.DOTALL) if words in text)
    return found


def test_the_training_loop_of_the_readme_makes_the_steps_of_training_step():
    code = re.search(r"```python\n(.*?)```", TEXTS["README.md"], re.DOTALL)[1]
    torch.manual_seed(0)
    labeled = [(torch.randn(4, 3, 16, 16).double(), torch.randint(10, (4,))) for _ in range(2)]
    unlabeled = [torch.randn(4, 3, 16, 16).double() for _ in range(2)]
    weights = []
    for own in (True, False):
        torch.manual_seed(1)
        model = build_model("convsmall", 10).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if own:
            exec(code, {"model": model, "optimizer": optimizer, "labeled_loader": labeled, "unlabeled_loader": unlabeled})
        else:
            for (x_l, y_l), x_u in zip(labeled, unlabeled):
                training_step(model, optimizer, x_l, y_l, x_u, alpha=0.1, beta=0.1)
        weights.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    assert close(*weights, 10_000)


def test_the_call_of_training_step_in_the_documents_makes_a_step_with_another_number_of_unlabeled_images():
    code = block("result =")
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    names = {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "x_l": torch.randn(2, 3),
             "y_l": torch.tensor([0, 1]), "x_u": torch.randn(6, 3)}
    exec(code, names)
    assert names["result"].finite and names["result"].y_hat.shape == (6, 2) and not torch.equal(model.weight, before)


def test_the_model_in_a_program_gives_the_probabilities_of_the_predictions_also_once_it_is_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos", count=4)
    assert train_meta.main(["--dataset", "folder", "--data-path", "photos", "--num-label", "4", "--image-size", "16",
                            "-a", "convsmall", "--batch-size", "4", "--total-steps", "2", "--warmup", "1", "--device", "cpu",
                            "--num-workers", "0", "--save-path", "results/photos"]) == 0
    assert train_meta.main(["--evaluate", "results/photos/model_best.pth", "--predictions", "all.csv", "--device", "cpu"]) == 0
    row, *_ = csv.DictReader(open("all.csv", encoding="utf-8"))
    code = block("torch.export.save")
    for ours, here in (('"convlarge"', '"convsmall"'), ('"photo.jpg"', repr(row["file"]))):
        assert code.count(ours) == 1
        code = code.replace(ours, here)
    found = {}
    exec(code, found)
    expected = torch.tensor([float(row[name]) for name in found["names"]])
    exported = torch.export.load("model.pt2").module()(found["x"]).softmax(dim=1)[0]
    assert close(found["probabilities"], expected) and close(exported, expected) and len(expected) == 2
    assert found["names"][found["probabilities"].argmax()] == row["predicted_name"]


def test_four_lines_make_class_folders_of_a_table_of_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "source", count=1)
    (tmp_path / "source" / "train").rename("images")
    files = sorted(str(path.relative_to("images")) for path in Path("images").rglob("*.png"))
    lines = ["file,class", *(f'{file},"class {i}, of two"' for i, file in enumerate(files))]
    Path("labels.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    code = block("labels.csv")
    exec(code, {})
    made = {str(path): path.read_bytes() for path in Path("photos").rglob("*.png")}
    assert made == {f"photos/train/class {i}, of two/00.png": Path("images", file).read_bytes() for i, file in enumerate(files)}
    assert len(made) == 2 and len(code.splitlines()) == 4


def test_no_command_stands_twice_every_one_is_accepted_and_every_flag_is_described():
    lines = [line for text in TEXTS.values() for line in lines_of(text)]
    assert len(lines) > 35 and sorted({line for line in lines if lines.count(line) > 1}) == []
    parse = {"train_meta.py": resolve_flags, "plot_features.py": plot_features.parse, "reproduce.py": reproduce.parse}
    for line in lines:
        script, flags = words_of(line) or (None, [])
        if script in parse and "docker" not in line and flags != ["--help"]:        # test_docker.py parses those of docker
            assert parse[script](flags)
        else:
            assert script is None or "docker" in line or (ROOT / script).exists(), line
    for parser in (training_parser(), plot_features.plotting_parser()):
        for action in parser._actions:
            said = re.escape(str(action.help) % {**vars(action), "prog": parser.prog})
            row = rf"\| .*`{action.option_strings[-1]}\b.* \| {said} \|"
            assert action.dest in ("help", "gpu") or re.search(row, TEXTS["docs/usage.md"]), row


def test_every_link_and_picture_of_the_documents_leads_to_a_place_that_is_there():
    texts = {**TEXTS, "REPRODUCTION.md": (ROOT / "REPRODUCTION.md").read_text()}
    links = [(file, *link.partition("#")[::2]) for file, text in texts.items()
             for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    assert len(links) > 60
    for file, path, place in links:
        target = ((ROOT / file).parent / path).resolve()
        assert target.exists() and target.is_relative_to(ROOT), (file, path)
        if place and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert place in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], (file, place)


def test_the_table_of_injections_names_every_one_and_none_was_lost():
    rows = re.findall(r"^\| (F\d+) \| (.+?) \| (\d+) \| (\d+) \| 0 \| [1-9]\d* of \d+ \| \d+ \|$", TEXTS["docs/runs.md"],
                      re.MULTILINE)
    assert [row[:2] for row in rows] == [(name, injection.inject.__doc__.rstrip(".")) for name, injection in INJECTIONS.items()]
    assert all(tries == survived for *_, tries, survived in rows)
