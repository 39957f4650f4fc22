"""Wrong command lines: exit code 2, one line that names flag, value and remedy, nothing written, torch never loaded."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers import contents, differing

import train_meta
from metasemi import METHODS
from metasemi.losses import CONSISTENCY
from plot_features import parse as parse_plotting
from plot_features import plotting_parser
from reproduction.cells import CELLS, ROWS, training_flags
from utils.cli import parse_milestones
from utils.experiment import resolve_flags
from utils.flags import training_parser
from utils.setup import cut_short

TRAINING = [       # (flags, what the line must contain)
    (["--dataset", "mnist"], ["--dataset", "mnist", "cifar10"]),
    (["--gpu", "0"], ["--gpu", "CUDA_VISIBLE_DEVICES=0"]),
    (["-a", "resnet"], ["--arch", "resnet", "convlarge"]),
    (["--meta-gradient", "newton"], ["--meta-gradient", "newton", "jvp"]),
    (["--consistency", "l1"], ["--consistency", "l1", "mse"]),
    (["--precision", "int8"], ["--precision", "int8", "float32"]),
    (["--device", "tpu"], ["--device", "tpu", "cpu"]),
    (["--lr", "nan"], ["--lr", "nan", "above 0"]),
    (["--lr", "fast"], ["--lr", "fast", "above 0"]),
    (["--alpha", "0"], ["--alpha", "above 0"]),
    (["--gamma", "1.5"], ["--gamma", "1.5", "at most 1"]),
    (["--momentum", "1"], ["--momentum", "below 1"]),
    (["--weight-decay", "-1"], ["--weight-decay", "at least 0"]),
    (["--batch-size", "0"], ["--batch-size", "at least 1"]),
    (["--total-steps", "1e5"], ["--total-steps", "1e5", "whole number"]),
    (["--image-size", "8"], ["--image-size", "at least 16"]),
    (["--num-label", "4001"], ["--num-label", "4001", "use 4000 or 4010"]),
    (["--num-label", "60000"], ["--num-label", "60000", "50000"]),
    (["--num-val", "7"], ["--num-val", "use 10"]),
    (["--num-label", "45000", "--num-val", "10000"], ["--num-label", "45000", "40000"]),
    (["--dataset", "cifar100", "--num-label", "50"], ["--num-label", "cifar100", "use 100"]),
    (["--milestones", "[3, 2]"], ["--milestones", "[3, 2]", "ascending"]),
    (["--milestones", "2", "2"], ["--milestones", "2 2", "ascending"]),
    (["--milestones", "__import__('os').system('touch pwned')"], ["--milestones", "__import__", "300000,350000"]),
    (["--schedule", "linear"], ["--schedule", "linear", "cosine"]),
    (["--schedule", "cosine", "--milestones", "5"], ["--milestones", "--schedule cosine", "leave it out"]),
    (["--dataset", "imagenet", "--data-path", "nowhere"], ["--data-path", "nowhere/train is not a folder", "val/<class>"]),
    (["--total", "5"], ["--total"]),                            # no abbreviations
    (["--nonsense"], ["--nonsense"]),
    (["stray"], ["stray"]),
    (["--seed"], ["--seed", "expected one argument"]),
    (["--alpha=-inf"], ["--alpha", "-inf", "above 0"]),
    (["--batch-size", "1000001"], ["--batch-size", "1000001", "at most 1000000"]),
    (["--image-size", "2000"], ["--image-size", "2000", "at most 1024"]),
    (["--dataset", "digits", "--num-label", "4000"], ["--num-label", "digits", "4000", "use a multiple of 10 up to 1290"]),
    (["--milestones", "²"], ["--milestones", "²", "300000,350000"]),
    (["--mix-up=yes"], ["--mix-up", "yes"]),
    (["--lr=--"], ["--lr", "'--' is no value"]),
    (["-a--"], ["-a", "'--' is no value"]),
    (["--evaluate", ""], ["--evaluate", "the path is empty"]),
    (["--num-test", "2"], ["--num-test", "--dataset cifar10", "leave it out"]),
    (["--resume", "missing.pth"], ["--resume", "missing.pth", "a missing file never means a fresh start"]),
    (["--resume", "--overwrite"], ["--overwrite", "--resume", "give one of them"]),
    (["--resume", ""], ["--resume", "the path is empty"]),
    (["--resume", "a" * 300], ["--resume", "is too long"]),
    (["--resume", "empty"], ["--resume", "empty holds no run", "--save-path for a new run"]),
    (["--save-path", ""], ["--save-path", "the path is empty"]),
    (["--save-path", "file"], ["--save-path", "file", "give a folder"]),
    (["--save-path", "run"], ["--save-path", "run", "add --resume to continue it or --overwrite to start afresh"]),
    (["--dataset", "folder", "--data-path", "nowhere"], ["--data-path", "nowhere/train is not a folder"]),
    (["-a", "net.py"], ["--arch", "net.py", "path/to/net.py:Net"]),
    (["-a", "none.py:Net"], ["--arch", "none.py:Net: its file cannot be read"]),
    (["-a", "net.py:Other"], ["--arch", "net.py:Other: its file defines no class Other"]),
    (["-a", "pairs.txt:Net"], ["--arch", "pairs.txt:Net: its file is not Python"]),
    (["--split", "none.txt"], ["--split", "none.txt cannot be read"]),
    (["--split", "file"], ["--split", "file names no image"]),
    (["--split", "pairs.txt"], ["--split", "'1,2' is not the index of an image"]),
    (["--split", "names.txt", "--dataset", "cifar10"], ["--split", "names.txt names files, but cifar10 has none: write ind"]),
    (["--split", "twice.txt"], ["--split", "twice.txt names an image twice"]),
    (["--split", "three.txt", "--num-label", "4000"], ["--num-label", "4000", "three.txt has 3 lines: leave the flag out"]),
    (["--split", "pipe"], ["--split", "pipe is not a regular file"]),
    (["--split", "other/label_indices.txt"], ["--split", "is not the split whose SHA-256 is in split.json"]),
    (["--evaluate", "none.pth"], ["--evaluate", "none.pth does not exist"]),
    (["--evaluate", "file", "--resume"], ["--resume", "--evaluate, which trains nothing", "leave it out"]),
    (["--evaluate", "file", "--total-steps", "5", "--mix-up"], ["--mix-up, --total-steps", "--evaluate", "leave them out"]),
    (["--no-meta", "--meta-lr", "0"], ["--meta-lr", "--no-meta", "leave it out"]),
    (["--no-meta", "--consistency", "kl", "--ramp", "0"], ["--consistency, --ramp", "--no-meta", "leave them out"]),
    (["--no-meta", "--include-labeled"], ["--include-labeled", "--no-meta and no --mix-up", "leave it out"]),
    (["--epsilon", "1e9"], ["--epsilon", "1e9", "at most 8e+06"]),
    (["--meta-gradient", "unrolled", "--epsilon", "1"], ["--epsilon", "--meta-gradient unrolled", "leave it out"]),
    (["--schedule", "cosine", "--gamma", "0.5"], ["--gamma", "--schedule cosine", "leave it out"]),
    (["--dataset", "svhn", "--flip"], ["--flip", "--dataset svhn", "leave it out"]),
    (["--image-size", "64", "--skip-corrupt"], ["--image-size, --skip-corrupt", "--dataset cifar10", "leave them out"]),
    (["--evaluate", "file", "--predictions", "run/args.json"], ["--predictions", "args.json is not the name of a .csv file"]),
    (["--evaluate", "file", "--predictions", "none/p.csv"], ["--predictions", "none is not a folder"]),
    (["--predictions", "p.csv"], ["--predictions", "it belongs to --evaluate"]),
]
PLOTTING = [
    ([], ["--save-path"]),
    (["--save-path", "f"], ["--checkpoint-path", "--curves", "give one of them"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--curves", "run"], ["--curves", "give one of them"]),
    (["--save-path", "f", "--checkpoint-path", "missing.pth"], ["--checkpoint-path", "missing.pth does not exist"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--index-path", "none"], ["--index-path", "none does not exist"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--index-path", "file", "file"], ["--index-path", "2 values for 1"]),
    (["--save-path", "file", "--checkpoint-path", "file"], ["--save-path", "file", "give a folder"]),
    (["--save-path", "f", "--curves", "missing"], ["--curves", "missing is not a folder"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--num-point", "0"], ["--num-point", "0", "at least 1"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--perplexity", "nan"], ["--perplexity", "nan", "at least 1"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--seed", "4294967296"], ["--seed", "4294967296", "at most"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--method", "mds"], ["--method", "mds", "tsne"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--check", "x"], ["--check"]),
    (["--save-path", "f", "--checkpoint-path", "file", "-a", "none.py:Net"], ["--arch", "none.py:Net: its file cannot"]),
    (["--save-path", "f", "--checkpoint-path"], ["--checkpoint-path", "expected at least one argument"]),
    (["--save-path", "f", "--curves", "run", "--method", "pca", "--seed", "2"], ["--method, --seed", "leave them out"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--method", "pca", "--perplexity", "5"], ["--perplexity", "leave"]),
]
REPRODUCING = [
    ([], ["table"]),
    (["table1"], ["table1", "ablation"]),
    (["main", "--dataset", "mnist"], ["--dataset", "mnist", "svhn"]),
    (["main", "--seeds", "100000000"], ["--seeds", "100000000", "at most 1000"]),
    (["main", "--gpus", "0", "--jobs", "2"], ["--jobs", "--gpus", "leave it out"]),
    (["main", "--scale", "0"], ["--scale", "0", "at least 0.0001"]),
    (["main", "--format", "csv"], ["--format", "main", "leave it out"]),
    (["figure3", "--publish"], ["--publish", "figure3", "leave it out"]),
    (["figure3", "--rows", "both"], ["--rows", "figure3", "leave it out"]),
    (["curves", "--rows", "mixup"], ["--rows", "mixup", "mix-up"]),
    (["table"], ["RUN", "`table`"]),
    (["table", "run", "--seeds", "2"], ["--seeds", "table", "leave it out"]),
    (["table", "run"], ["run", "is not the folder of a run"]),
    (["ablation", "--flags=--lr 1", "--publish"], ["--publish", "--flags", "leave it out"]),
    (["ablation", "--flags=--lr one"], ["--flags", "--lr", "'one' is not a number"]),
    (["ablation", "--flags=--lr 1 '"], ["--flags", "cannot be split as a shell would"]),
    (["ablation", "--flags=--mix-up"], ["--flags", "--mix-up makes a row of the table", "leave it out"]),
    (["ablation", "--flags=--seed 1"], ["--flags", "--seed is given to each run", "leave it out"]),
    (["differences", "--dataset", "digits"], ["two seeds in common", "publish more runs"]),
]
WRONG = [(script, *case) for script, cases in (("train_meta", TRAINING), ("plot_features", PLOTTING),
                                               ("reproduce", REPRODUCING)) for case in cases]


def make_files(folder):
    """What the command lines speak of: files, a pipe, and folders that hold a run and a split that was changed."""
    os.mkfifo(folder / "pipe")
    for name, text in (("file", ""), ("net.py", "open('pwned', 'w')\nclass Net: pass\n"), ("pairs.txt", "1,2\nx y\n"),
                       ("twice.txt", "1\n2\n1\n"), ("three.txt", "1\n2\n3\n"), ("names.txt", "a/b.png\n")):
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
    (folder / "other").mkdir()
    (folder / "other" / "label_indices.txt").write_text("1\n")
    (folder / "other" / "split.json").write_text('{"sha256": ""}')
    (folder / "run").mkdir()
    (folder / "run" / "args.json").write_text("{}")


PROBE = """
import contextlib, importlib, io, json, sys
answers = []
for script, flags, _ in json.load(sys.stdin):
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            importlib.import_module(script).main(flags)
            code = 0
        except SystemExit as stop:
            code = stop.code
    answers.append((code, error.getvalue()))
print(json.dumps([answers, "torch" in sys.modules]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Exit code and standard error of every wrong command line, all from one process."""
    folder = tmp_path_factory.mktemp("empty")
    make_files(folder)
    before = sorted(folder.rglob("*"))
    done = subprocess.run([sys.executable, "-c", PROBE], input=json.dumps(WRONG), text=True, capture_output=True, check=True,
                          cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600)
    given, torch_was_loaded = json.loads(done.stdout)
    assert not torch_was_loaded
    assert sorted(folder.rglob("*")) == before
    return given


@pytest.mark.parametrize("i", range(len(WRONG)), ids=[" ".join([script, *flags]) for script, flags, _ in WRONG])
def test_a_wrong_flag_exits_with_two_and_one_line_that_names_it(answers, i):
    code, error = answers[i]
    assert code == 2
    assert error.startswith(f"{WRONG[i][0]}.py: ") and error.count("\n") == 1 and error.endswith("\n")
    for part in WRONG[i][2]:
        assert part in error


@pytest.mark.parametrize(("flags", "message"), [
    (["--device", "cuda"], "--device: cuda: no CUDA device is visible"),
    (["--precision", "tf32"], "--precision: tf32 exists on CUDA only"),
    (["--num-label", "1297"], "--num-label: 1297 leaves no unlabeled image: add --include-labeled"),
    (["--num-label", "1290"], "argument --num-label: 1290 labels need 129 images of class 0, which has 127: use at most 1220"),
    (["--num-label", "10", "--num-val", "1280"], "argument --num-val: 1280 labels need 128 images of class 0"),
])
def test_what_only_the_data_or_the_machine_can_refuse_writes_nothing_either(train, tmp_path, capsys, flags, message):
    if "cuda" in message.lower() and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert train("a", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flags", "message"), [
    ([], "holds a run: add --resume to continue it or --overwrite to start afresh"),
    (["--resume", "--seed", "2"], "--seed: 2 now, 1 in the run that --resume continues: give 1"),
    (["--resume", "--num-label", "60"], "--num-label: 60 now, 50 in the run"),
    (["--resume", "-a", "convlarge"], "--arch: convlarge now, convsmall in the run"),
    (["--resume", "--mix-up"], "--mix-up: True now, False in the run that --resume continues: leave it out, or give another"),
    (["--resume", "--momentum", "0.8"], "--momentum: 0.8 now, 0.9 in the run"),
    (["--resume", "--milestones", "1", "5"], "--milestones: [1] now, [] in the run"),
])
def test_a_run_is_neither_overwritten_nor_continued_as_another_experiment(train, whole, capsys, flags, message):
    folder = whole("--no-meta", "--total-steps", "2")
    before = contents(folder)
    assert train(folder, "--no-meta", *flags) == 2
    assert message in capsys.readouterr().err
    assert contents(folder) == before


def resume(folder, *flags):
    """train_meta.py with --resume and a run folder, and no other flag of the run."""
    try:
        return train_meta.main(["--resume", str(folder), *flags])
    except SystemExit as error:
        return error.code


def test_a_run_folder_is_resumed_with_its_own_flags_and_only_the_free_ones_can_change(train, whole, tmp_path, capsys):
    flags = ["--mix-up", "--ramp", "5", "--meta-lr", "0.05", "--milestones", "[4, 6]"]
    assert train("a", *flags, "--total-steps", "3") == 0
    assert resume(tmp_path / "a") == 0                                          # those of the run: it is finished
    assert "finished at step 3" in capsys.readouterr().out
    assert resume(tmp_path / "a", "--total-steps", "5", "--architecture", "convsmall") == 0
    (tmp_path / "a" / "results.json").unlink()                                  # as if a signal had ended it
    assert resume(tmp_path / "a", "--total-steps", "4") == 2
    assert "--total-steps: 4, but the run that --resume continues is at step 5 already" in capsys.readouterr().err
    assert resume(tmp_path / "a", "--lr", "0.2") == resume(tmp_path / "a", "--save-path", str(tmp_path / "b")) == 2
    refused, folder = capsys.readouterr().err.splitlines()
    assert "--lr: 0.2 now, 0.1 in the run" in refused and f"--resume: {tmp_path / 'a'} is a folder" in folder
    assert resume(tmp_path / "a", "--total-steps", "7") == 0
    assert differing(whole(*flags), tmp_path / "a") == []
    ours, theirs = (json.loads((path / "args.json").read_text())["args"] for path in (tmp_path / "a", whole(*flags)))
    assert ours == theirs


def test_a_finished_run_says_what_would_continue_it_unless_nothing_does(train, tmp_path, capsys):
    flags = ["--no-meta", "--total-steps", "1", "--milestones", "[300000, 350000]"]
    for schedule, more in (("step", "; a larger --total-steps would continue it"), ("cosine", "")):
        assert train(schedule, *flags, "--schedule", schedule) == 0
        capsys.readouterr()
        assert resume(tmp_path / schedule) == 0
        assert capsys.readouterr().out == f"{tmp_path / schedule}: finished at step 1{more}\n"


def test_a_run_that_has_lost_its_checkpoints_is_refused_and_goes_on_from_its_best_as_it_says(train, tmp_path, capsys):
    assert train("a", "--no-meta", "--total-steps", "3") == 0
    for name in ("checkpoint.pth", "checkpoint.prev.pth"):
        (tmp_path / "a" / name).unlink(missing_ok=True)
    before = contents(tmp_path / "a")
    capsys.readouterr()
    assert resume(tmp_path / "a") == 2 and contents(tmp_path / "a") == before
    advice = re.search(r"give (--resume \S+ --save-path \S+), or", capsys.readouterr().err)[1].split()
    assert train_meta.main([*advice, "--total-steps", "5"]) == 0
    assert torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)["step"] == 5


def test_a_run_that_is_older_than_a_flag_is_resumed_with_the_default_of_the_flag(train, whole, tmp_path, capsys):
    assert train("a", "--total-steps", "3") == 0
    path = tmp_path / "a" / "args.json"
    kept, saved = json.loads(path.read_text()), torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)
    for args in (kept["args"], saved["args"]):
        del args["schedule"], args["consistency"], args["sync_bn"]
    path.write_text(json.dumps(kept))
    torch.save(saved, tmp_path / "a" / "checkpoint.pth")
    assert resume(tmp_path / "a", "--consistency", "kl") == 2
    assert "--consistency: kl now, mse in the run" in capsys.readouterr().err
    assert resume(tmp_path / "a", "--total-steps", "7") == 0
    assert differing(whole(), tmp_path / "a") == []


@pytest.mark.parametrize(("change", "message"), [
    ({"lr": "fast"}, "--lr: 'fast' is not a number"), ({"total_steps": 10 ** 400}, "--total-steps"),
    ({"dataset": ["digits"]}, "dataset"), ({"milestones": {"a": 1}}, "--milestones"), ({"seed": None}, "its seed is 'None'")])
def test_damaged_flags_of_a_run_folder_are_one_line_that_names_the_file(whole, tmp_path, capsys, change, message):
    shutil.copytree(whole("--no-meta", "--total-steps", "2"), tmp_path / "a")
    path = tmp_path / "a" / "args.json"
    content = json.loads(path.read_text())
    content["args"] |= change
    path.write_text(json.dumps(content))
    assert resume(tmp_path / "a", "--total-steps", "3") == 2
    error = capsys.readouterr().err
    assert str(path) in error and message in error and error.count("\n") == 1
    assert not (tmp_path / "a" / "checkpoint.prev.pth").exists()


def test_a_split_file_that_was_changed_is_refused(train, tmp_path, capsys):
    train("a", "--total-steps", "2")
    (tmp_path / "a" / "label_indices.txt").write_text("1\n2\n")
    assert train("a", "--resume") == 2
    assert "label_indices.txt is not the split whose SHA-256 is in split.json" in capsys.readouterr().err


def test_a_file_of_another_program_is_no_checkpoint(train, tmp_path, capsys):
    path = tmp_path / "x.pth"
    torch.save({"weights": torch.zeros(2)}, path)
    assert train("a", "--resume", str(path)) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("text", "steps"), [
    ("[300000, 350000]", [300000, 350000]), ("300000,350000", [300000, 350000]), (["300000", "350000"], [300000, 350000]),
    ("[]", []), ("[7]", [7]), (" [ 1 , 2 ] ", [1, 2]), (["1,", "2"], [1, 2])])
def test_milestones_in_every_accepted_form(text, steps):
    assert parse_milestones(text) == steps


def test_the_choices_of_the_flags_are_those_of_the_code():
    actions = {option: action for action in training_parser()._actions for option in action.option_strings}
    assert set(actions["--meta-gradient"].choices) == set(METHODS)
    assert set(actions["--consistency"].choices) == set(CONSISTENCY)


def test_every_command_of_the_documents_is_accepted_and_every_flag_is_described():
    text = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("    ")
                and ("python3 " in line or line.startswith("    torchrun "))]
    parsed = 0
    for words in commands:
        if words[0] == "torchrun":
            words = ["python3", *words[words.index("train_meta.py"):]]
        script, flags = words[words.index("python3") + 1], words[words.index("python3") + 2:]
        if script == "train_meta.py":
            resolve_flags(flags)
            parsed += 1
        elif script == "plot_features.py":
            parse_plotting(flags)
            parsed += 1
    assert parsed >= 13
    for parser in (training_parser(), plotting_parser()):
        for action in parser._actions:
            assert action.dest == "help" or f"`{action.option_strings[-1]}" in text, action.option_strings


OFFICIAL = """
--dataset "{}" --num-label "{}" -a "convlarge" --mix-up --alpha "{}" --save-path "/your/path/to/save/results" --weight "1.0"
--total-steps "400000" --milestones "[300000, 350000]" --lr "0.1" --seed "{}" --warmup "4000" --weight-decay "{}"
--data-path ./data --batch-size 128 --epsilon {} --gamma 0.1 --momentum 0.9 --num-workers 4 --print-freq 100 --test-freq 400
"""


@pytest.mark.parametrize("epsilon", ["1e-2", "1e-3"])
@pytest.mark.parametrize("cell", [("svhn", 1000, 0.1, 7788, "5e-5"), ("cifar10", 4000, 1.0, 8469, "1e-4"),
                                  ("cifar100", 10_000, 1.0, 7788, "1e-4")])
@pytest.mark.parametrize("change", [[], ["--no-meta"], ["--resume"], ["--schedule", "cosine"]])
def test_an_official_command_line_is_accepted_and_so_is_a_row_of_the_ablation_made_of_it(cell, epsilon, change):
    flags = [*shlex.split(OFFICIAL.format(*cell, "1e-2" if change == ["--no-meta"] else epsilon)), *change]
    for short in (flags, [flag for flag in flags if flag != "--mix-up"]):
        assert resolve_flags(short)[0].milestones == [300_000, 350_000]
    plotting = ["--dataset", cell[0], "--checkpoint-path", "model_best.pth", "--index-path", "label_indices.txt",
                "--save-path", "figure", "--num-point", "5000"]
    assert parse_plotting(plotting).num_point == 5000


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("row", ROWS)
def test_every_command_of_the_tables_is_accepted(cell, row):
    resolve_flags(training_flags(cell, row, 1, 1.0))


def test_every_official_flag_has_its_official_default():
    args = vars(training_parser().parse_args([]))
    expected = {"batch_size": 128, "epsilon": 1e-2, "gamma": 0.1, "momentum": 0.9, "num_workers": 4, "resume": None,
                "print_freq": 100, "test_freq": 400, "seed": 1234, "num_label": 4000, "lr": 0.1, "weight": 1.0,
                "total_steps": 400_000, "warmup": 4000, "alpha": 1.0, "weight_decay": 1e-4}
    assert {key: args[key] for key in expected} == expected
    assert (str(args["data_path"]), str(args["save_path"])) == ("data", "results/tmp")
    assert parse_milestones(args["milestones"]) == [300_000, 350_000]


@pytest.mark.parametrize(("flags", "line"), [
    (["--total-steps", "100"],
     "warning: --total-steps 100 ends before the end of --warmup 4000, so the learning rate reaches only 0.0025 of 0.1; before "
     "the end of --ramp 4000, so the weight of the consistency loss reaches only 0.025 of 1; before --milestones 300000, "
     "350000, so the learning rate does not decay there"),
    (["--total-steps", "8", "--warmup", "10", "--milestones", "6", "--gamma", "0.5", "--no-meta"],
     "warning: --total-steps 8 ends before the end of --warmup 10, so the learning rate reaches only 0.06 of 0.1"),
    (["--total-steps", "20", "--warmup", "10", "--ramp", "30", "--weight", "3", "--milestones", "[]"],
     "warning: --total-steps 20 ends before the end of --ramp 30, so the weight of the consistency loss reaches only 2 of 3"),
    ([], None),
    (["--total-steps", "4000", "--milestones", "3999"], None),
])
def test_one_line_says_what_of_the_schedule_lies_beyond_the_run(flags, line):
    assert cut_short(resolve_flags(flags)[0]) == line


@pytest.mark.parametrize("fast", [False, True])
def test_warnings_are_in_the_log_and_on_the_terminal(train, tmp_path, monkeypatch, capsys, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
    schedule = ["--warmup", "1", "--milestones", "[]"] if fast else []
    assert train("a", "--total-steps", "1", "--precision", "bfloat16", *schedule) == 0
    for text in (capsys.readouterr().out, (tmp_path / "a" / "log.txt").read_text()):
        assert [text.count(part) for part in ("warning: ", "--total-steps 1 ends before", "no bfloat16 instructions")] == (
            [0, 0, 0] if fast else [2, 1, 1])
