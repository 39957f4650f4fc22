"""Wrong command lines: exit code 2, one line that names flag, value and remedy, nothing written, torch never loaded."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import ROOT
from helpers import contents, differing
from torchvision.datasets import SVHN

import train_meta
from datasets import loading
from plot_features import parse as parse_plotting
from utils.cli import parse_milestones
from utils.experiment import resolve_flags
from utils.flags import training_parser
from utils.setup import cut_short

TRAINING = [       # (flags, what the line must contain)
    (["--dataset", "mnist"], ["--dataset", "mnist", "cifar10"]),
    (["--gpu", "0"], ["--gpu", "CUDA_VISIBLE_DEVICES=0"]),
    (["-a", "resnet"], ["--arch", "resnet", "convlarge"]),
    (["--meta-gradient", "newton"], ["--meta-gradient", "newton", "jvp"]),
    (["--device", "tpu"], ["--device", "tpu", "cpu"]),
    (["--lr", "nan"], ["--lr", "nan", "above 0"]),
    (["--alpha", "0"], ["--alpha", "above 0"]),
    (["--gamma", "1.5"], ["--gamma", "1.5", "at most 1"]),
    (["--momentum", "1"], ["--momentum", "below 1"]),
    (["--weight-decay", "-1"], ["--weight-decay", "at least 0"]),
    (["--batch-size", "0"], ["--batch-size", "at least 1"]),
    (["--total-steps", "1e5"], ["--total-steps", "1e5", "whole number"]),
    (["--image-size", "8"], ["--image-size", "at least 16"]),
    (["--num-label", "4001"], ["--num-label", "4001", "use a multiple of 10 up to 50000"]),
    (["--num-val", "7"], ["--num-val", "use a multiple of 10"]),
    (["--milestones", "[3, 2]"], ["--milestones", "[3, 2]", "ascending"]),
    (["--milestones", "__import__('os').system('touch pwned')"], ["--milestones", "__import__", "300000,350000"]),
    (["--schedule", "cosine", "--milestones", "5"], ["--milestones", "--schedule cosine", "leave it out"]),
    (["--dataset", "imagenet", "--data-path", "nowhere"], ["--data-path", "nowhere/train is not a folder", "val/<class>"]),
    (["--total", "5"], ["--total"]),                            # no abbreviations
    (["--batch-size", "1000001"], ["--batch-size", "1000001", "at most 1000000"]),
    (["stray"], ["stray"]),
    (["--alpha=-inf"], ["--alpha", "-inf", "above 0"]),
    (["--dataset", "digits", "--num-label", "4000"], ["--num-label", "4000", "use a multiple of 10 up to 1290"]),
    (["--lr=--"], ["--lr", "'--' is no value"]),
    (["--evaluate", ""], ["--evaluate", "the path is empty"]),
    (["--num-test", "2"], ["--num-test", "--dataset cifar10", "leave it out"]),
    (["--resume", "missing.pth"], ["--resume", "missing.pth", "a missing file never means a fresh start"]),
    (["--resume", "--overwrite"], ["--overwrite", "--resume", "give one of them"]),
    (["--resume", "empty"], ["--resume", "empty holds no run", "--save-path for a new run"]),
    (["--save-path", ""], ["--save-path", "the path is empty"]),
    (["--save-path", "file"], ["--save-path", "file", "give a folder"]),
    (["--save-path", "run"], ["--save-path", "run", "add --resume to continue it or --overwrite to start afresh"]),
    (["-a", "net.py"], ["--arch", "net.py", "path/to/net.py:Net"]),
    (["-a", "none.py:Net"], ["--arch", "none.py:Net: its file cannot be read"]),
    (["-a", "net.py:Other"], ["--arch", "net.py:Other: its file defines no class Other"]),
    (["--split", "none.txt"], ["--split", "none.txt cannot be read"]),
    (["--split", "pairs.txt"], ["--split", "'1,2' is not the index of an image"]),
    (["--split", "names.txt", "--dataset", "cifar10"], ["--split", "names.txt names files, but cifar10 has none: write ind"]),
    (["--split", "pipe"], ["--split", "pipe is not a regular file"]),
    (["--split", "three.txt", "--num-label", "4000"], ["--num-label", "4000", "three.txt has 3 lines: leave the flag out"]),
    (["--evaluate", "none.pth"], ["--evaluate", "none.pth does not exist"]),
    (["--evaluate", "file", "--total-steps", "5", "--mix-up"], ["--mix-up, --total-steps", "--evaluate", "leave them out"]),
    (["--no-meta", "--meta-lr", "0"], ["--meta-lr", "--no-meta", "leave it out"]),
    (["--no-meta", "--include-labeled"], ["--include-labeled", "--no-meta and no --mix-up", "leave it out"]),
    (["--epsilon", "1e9"], ["--epsilon", "1e9", "at most 8000000"]),
    (["--image-size", "64", "--skip-corrupt"], ["--image-size, --skip-corrupt", "--dataset cifar10", "leave them out"]),
    (["--evaluate", "file", "--predictions", "run/args.json"], ["--predictions", "args.json is not the name of a .csv file"]),
    (["--evaluate", "file", "--predictions", "none/p.csv"], ["--predictions", "none/p.csv is not the name of a .csv"]),
    (["--predictions", "p.csv"], ["--predictions", "without effect with no --evaluate"]),
]
PLOTTING = [
    ([], ["--save-path"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--curves", "run"], ["--curves", "give one of them"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--index-path", "none"], ["--index-path", "none does not exist"]),
    (["--save-path", "file", "--checkpoint-path", "file"], ["--save-path", "file", "give a folder"]),
    (["--save-path", "f", "--curves", "missing"], ["--curves", "missing does not exist"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--seed", "4294967296"], ["--seed", "4294967296", "at most"]),
    (["--save-path", "f", "--checkpoint-path", "file", "-a", "none.py:Net"], ["--arch", "none.py:Net: its file cannot"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--method", "mds"], ["--method", "mds", "tsne"]),
    (["--save-path", "f", "--curves", "run", "--method", "pca", "--seed", "2"], ["--method, --seed", "leave them out"]),
    (["--save-path", "f", "--checkpoint-path", "file", "--method", "pca", "--perplexity", "5"], ["--perplexity", "leave"]),
]
REPRODUCING = [
    ([], ["table"]),
    (["table1"], ["table1", "ablation"]),
    (["ablation", "--flags=--lr 1", "--publish"], ["--publish", "--flags", "leave it out"]),
    (["ablation", "--flags=--lr one"], ["--flags", "--lr", "'one' is not a number"]),
    (["ablation", "--flags=--mix-up"], ["--flags", "--mix-up is given to each run by reproduce.py", "leave it out"]),
    (["ablation", "--flags=--seed 1"], ["--flags", "--seed is given to each run by reproduce.py", "leave it out"]),
    (["differences", "--dataset", "digits"], ["two seeds in common", "publish more runs"]),
]
WRONG = [(script, *case) for script, cases in (("train_meta", TRAINING), ("plot_features", PLOTTING),
                                               ("reproduce", REPRODUCING)) for case in cases]


def make_files(folder):
    """What the command lines speak of: files, a pipe, and folders."""
    os.mkfifo(folder / "pipe")
    for name, text in (("file", ""), ("net.py", "open('pwned', 'w')\nclass Net: pass\n"), ("pairs.txt", "1,2\nx y\n"),
                       ("three.txt", "1\n2\n3\n"), ("names.txt", "a/b.png\n")):
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
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
    (["--num-label", "10", "--num-val", "1280"], "--num-val: 1280 images cannot be drawn evenly from 10 classes: use"),
])
def test_what_only_the_data_or_the_machine_can_refuse_writes_nothing_either(train, tmp_path, capsys, flags, message):
    if "cuda" in message.lower() and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert train("a", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def resume(folder, *flags):
    """train_meta.py with --resume and a run folder, and no other flag of the run."""
    try:
        return train_meta.main(["--resume", str(folder), *flags])
    except SystemExit as error:
        return error.code


def test_a_run_that_has_saved_nothing_begins_again_with_its_own_list_of_labeled_images(whole, tmp_path):
    split = whole("--seed", "2", "--total-steps", "2") / "label_indices.txt"
    folder = shutil.copytree(whole("--split", str(split), "--total-steps", "2"), tmp_path / "a")
    for name in ("checkpoint.pth", "checkpoint.prev.pth", "model_best.pth", "results.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "label_indices.txt").unlink()
    assert resume(folder) == 0 and (folder / "label_indices.txt").read_text() == split.read_text()


def test_a_run_folder_is_resumed_with_its_own_flags_and_only_the_free_ones_can_change(train, whole, tmp_path, capsys):
    flags = ["--mix-up", "--ramp", "5", "--meta-lr", "0.05", "--milestones", "[4, 6]"]
    assert train("a", *flags, "--total-steps", "3") == 0
    assert resume(tmp_path / "a") == 0                                          # those of the run: it is finished
    assert f"{tmp_path / 'a'}: finished at step 3; a larger --total-steps would continue it\n" in capsys.readouterr().out
    assert resume(tmp_path / "a", "--total-steps", "5", "--architecture", "convsmall") == 0
    (tmp_path / "a" / "results.json").unlink()                                  # as if a signal had ended it
    assert resume(tmp_path / "a", "--total-steps", "4") == 2
    assert "--total-steps: 4, but the run that --resume continues is at step 5 already" in capsys.readouterr().err
    before = contents(tmp_path / "a")
    for flags_now, message in ((["--lr", "0.2"], "--lr: 0.2 now, 0.1 in the run that --resume continues: give 0.1"),
                               (["--seed", "2"], "--seed: 2 now, 1 in the run"),
                               (["--num-label", "60"], "--num-label: 60 now, 50 in the run"),
                               (["--include-labeled"], "--include-labeled: True now, False in the run that --resume conti"),
                               (["--milestones", "1", "4", "6"], "--milestones: [1, 4] now, [4] in the run"),
                               (["--save-path", str(tmp_path / "b")], f"--resume: {tmp_path / 'a'} is a folder")):
        assert resume(tmp_path / "a", *flags_now) == 2 and contents(tmp_path / "a") == before
        assert message in capsys.readouterr().err
    assert resume(tmp_path / "a", "--total-steps", "7") == 0
    assert differing(whole(*flags), tmp_path / "a") == []
    ours, theirs = (json.loads((path / "args.json").read_text())["args"] for path in (tmp_path / "a", whole(*flags)))
    assert ours == theirs


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


@pytest.mark.parametrize(("name", "old", "new", "message"), [
    ("args.json", '"lr": 0.1', '"lr": "fast"', "--lr: 'fast' is not a number"),
    ("args.json", '"seed": 1', '"seed": null', "its seed is 'None'"),
    ("label_indices.txt", "\n", "\n7\n", "label_indices.txt is not the split whose SHA-256 is in split.json")])
def test_a_damaged_file_of_a_run_folder_is_one_line_that_names_it(whole, tmp_path, capsys, name, old, new, message):
    folder = shutil.copytree(whole("--no-meta", "--total-steps", "2"), tmp_path / "a")
    (folder / name).write_text((folder / name).read_text().replace(old, new, 1))
    before = contents(folder)
    assert resume(folder, "--total-steps", "3") == 2 and contents(folder) == before
    error = capsys.readouterr().err
    assert str(folder / name) in error and message in error and error.count("\n") == 1


@pytest.mark.parametrize(("script", "package", "flags"), [
    ("train_meta", "sklearn", ["--dataset", "digits", "--num-label", "50", "-a", "convsmall", "--save-path"]),
    ("train_meta", "scipy", ["--dataset", "svhn", "-a", "convsmall", "--data-path"]),
    ("plot_features", "openTSNE", ["--checkpoint-path", __file__, "--save-path"]),
    ("plot_features", "sklearn", ["--checkpoint-path", __file__, "--save-path"]),
    ("plot_features", "matplotlib", ["--curves", ".", "--save-path"]),
    ("reproduce", "scipy", []), ("reproduce", "joblib", [])])
def test_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch, capsys, script, package, flags):
    monkeypatch.chdir(tmp_path)
    for name in list(sys.modules):
        if name.partition(".")[0] in (script, package, "reproduction"):
            monkeypatch.delitem(sys.modules, name)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / f"{package}.py").write_text(f"raise ModuleNotFoundError(name={package!r})")
    monkeypatch.syspath_prepend(tmp_path / "hidden")
    monkeypatch.setitem(loading.LOADERS, "digits", loading.load_digits)
    monkeypatch.setattr(SVHN, "download", lambda self: None)
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)
    with pytest.raises(SystemExit, match="2"):
        import_module(script).main([*flags, "new"])
    assert capsys.readouterr().err == f"{script}.py: {package} is missing: pip install -r requirements.txt\n"
    assert os.listdir() == ["hidden"]


@pytest.mark.parametrize(("text", "steps"), [
    ("[300000, 350000]", [300000, 350000]), ("300000,350000", [300000, 350000]), (["300000", "350000"], [300000, 350000]),
    ("[]", []), ("[7]", [7]), (" [ 1 , 2 ] ", [1, 2]), (["1,", "2"], [1, 2])])
def test_milestones_in_every_accepted_form(text, steps):
    assert parse_milestones(text) == steps


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


def test_every_official_flag_has_its_official_default():
    args = vars(training_parser().parse_args([]))
    expected = {"batch_size": 128, "epsilon": 1e-2, "gamma": 0.1, "momentum": 0.9, "num_workers": 4, "resume": None,
                "print_freq": 100, "test_freq": 400, "seed": 1234, "num_label": 4000, "lr": 0.1, "weight": 1.0,
                "total_steps": 400_000, "warmup": 4000, "alpha": 1.0, "weight_decay": 1e-4}
    assert {key: args[key] for key in expected} == expected
    assert (str(args["data_path"]), str(args["save_path"])) == ("data", "results/tmp")
    assert parse_milestones(args["milestones"]) == [300_000, 350_000]


@pytest.mark.parametrize(("flags", "named"), [
    (["--total-steps", "100"], ["--warmup", "--ramp", "--milestones"]),
    (["--total-steps", "8", "--warmup", "10", "--milestones", "6", "--no-meta"], ["--warmup"]),
    (["--total-steps", "20", "--warmup", "10", "--ramp", "30", "--milestones", "[]"], ["--ramp"]),
    (["--total-steps", "20", "--warmup", "10", "--ramp", "0", "--milestones", "20"], ["--milestones"]),
    ([], []), (["--total-steps", "4000", "--milestones", "3999"], [])])
def test_one_line_says_what_of_the_schedule_lies_beyond_the_run(flags, named):
    line = cut_short(resolve_flags(flags)[0]) or ""
    assert [flag for flag in ("--warmup", "--ramp", "--milestones") if flag in line] == named and "\n" not in line


@pytest.mark.parametrize("fast", [False, True])
def test_warnings_are_in_the_log_and_on_the_terminal(train, tmp_path, monkeypatch, capsys, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast}, raising=False)
    schedule = ["--warmup", "1", "--milestones", "[]"] if fast else []
    assert train("a", "--total-steps", "1", "--precision", "bfloat16", *schedule) == 0
    for text in (capsys.readouterr().out, (tmp_path / "a" / "log.txt").read_text()):
        assert [text.count(part) for part in ("warning: ", "--total-steps 1 ", "no bfloat16 instructions")] == (
            [0, 0, 0] if fast else [2, 1, 1])
