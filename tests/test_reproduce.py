"""The plan, the queue and the report of reproduce.py."""
import ast
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from conftest import ROOT
from helpers import finished_run

import reproduce
from datasets import load_dataset
from datasets.splits import split_labels
from reproduction import published
from reproduction.cells import ABLATION, CELLS, ROWS, row_of
from reproduction.report import filled, tables
from reproduction.run import COLUMNS, Run, finished_runs
from utils.flags import parse_training
from utils.run_folder import median_name

LINE = {key: "" for key in COLUMNS} | {
    "cell": "cifar10", "row": "both", "seed": "1", "scale": "1", "steps": "400000", "median_last_20": "8", "best_test": "7",
    "seconds": "3600", "device": "gpu", "threads": "1", "precision": "float32", "torch": "2", "commit": "abc"}


def flags_of(line):
    words = shlex.split(line)
    flags = vars(parse_training(words[words.index("train_meta.py") + 1:]))
    return {name: value for name, value in flags.items() if name != "given"}


@pytest.mark.parametrize("table", [table for table in reproduce.TABLES if table != "imagenet"])
def test_a_dry_run_prints_commands_that_are_accepted_and_does_nothing(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main([table, "--dataset", *CELLS, "digits", "--seeds", "2", "--scale", "0.01", "--dry-run"]) == 0
    plan = [flags_of(line) for line in capsys.readouterr().out.splitlines()]
    assert len(plan) == 2 * len(CELLS) * len(reproduce.TABLES[table]) and not list(tmp_path.iterdir())
    assert len({str(flags["save_path"]) for flags in plan}) == len(plan)
    cifar = [flags for flags in plan if flags["dataset"] == "cifar10" and flags["arch"] == "convlarge"]
    assert all((flags["total_steps"], flags["warmup"], flags["test_freq"], flags["milestones"]) == (4000, 40, 4, [3000, 3500])
               for flags in cifar)


def test_the_rows_of_a_table_may_be_chosen_and_a_run_tells_which_row_it_is(capsys):
    assert reproduce.main(["curves", "--dataset", "digits", "--rows", *ROWS, *ROWS, "--dry-run"]) == 0
    plan = [flags_of(line) for line in capsys.readouterr().out.splitlines()]
    assert [flags["save_path"].name for flags in plan] == [f"{row}-1" for row in ROWS]
    assert [row_of(flags) for flags in plan[:-1]] == [row for row in ROWS if row != "supervised"]


def test_the_commands_of_the_tables_are_those_of_the_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for table in ("main", "ablation"):
        reproduce.main([table, "--dry-run"])
    free = ("save_path", "resume", "split", "print_freq")
    planned = [{k: v for k, v in flags_of(line).items() if k not in free} for line in capsys.readouterr().out.splitlines()]
    lines = re.findall(r"^    CUDA_VISIBLE_DEVICES=0 python3 (train_meta.py .*--save-path results/(?:svhn|cifar).*)$",
                       "".join((ROOT / name).read_text() for name in ("README.md", "docs/usage.md")), re.MULTILINE)
    assert len(lines) == 7
    for line in lines:
        assert {k: v for k, v in flags_of(line).items() if k not in free} in planned, line


def test_the_reports_are_what_runs_csv_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = published.read_runs()
    assert len(lines) >= 4 and [published.order(line) for line in lines] == sorted(map(published.order, lines))
    blocks = tables(lines)
    for path in published.REPORTS:
        text = path.read_text()
        assert filled(path, blocks) == text, f"{path} is behind results/runs.csv: python3 reproduce.py ablation ... --publish"
        assert set(re.findall(r"^<!-- (\S+) -->$", text, re.MULTILINE)) - {"end"} == {
            "README.md": {"cifar10-jpeg-500", "paired-cifar10-jpeg-500"},
            "REPRODUCTION.md": {"paired", "main", "ablation", "cells", "cifar10-jpeg-500", "cifar10-jpeg-250",
                                "cifar10-jpeg-1000", "digits", "cifar10-jpeg-long", "cifar10-jpeg-small", "telemetry",
                                "commands"}}[path.name]


@pytest.mark.parametrize(("errors", "verdict"), [
    ([7.7, 7.8, 7.9], "within the band"), ([9.0, 9.1, 9.2], "worse"), ([6.9, 7.0, 7.1], "better"), ([8.0], "worse, one seed")])
def test_the_verdict_compares_with_one_more_run(errors, verdict):
    lines = [{**LINE, "seed": str(i), "last": str(error)} for i, error in enumerate(errors)]
    blocks = tables(lines)
    mean = f"{np.mean(errors):.2f}" + (f" ± {np.std(errors, ddof=1):.2f}" if len(errors) > 1 else "")
    row = next(row for row in blocks["cells"].splitlines() if "CIFAR-10, 4,000 labels | both" in row)
    assert f"| {len(errors)} | {mean} | " in row and f"| 7.78 | {np.mean(errors) - 7.78:+.2f} | {verdict} | 1.00 |" in row
    assert f"| 7.78 | {mean} (n = {len(errors)}) |" in blocks["main"] and f"{mean} (n = " in blocks["ablation"]


def test_a_scaled_run_says_so_and_never_stands_beside_a_published_value():
    blocks = tables([{**LINE, "scale": "0.05", "steps": "20000", "last": "10"}])
    assert "| 0.05 | 20000 | 1 | 10.00 |" in blocks["cells"] and "not comparable at scale 0.05" in blocks["cells"]
    assert "10.00" not in blocks["main"] + blocks["ablation"] and "scale 0.05" in blocks["commands"]


def test_pseudo_labels_before_and_after_are_the_means_of_each_quarter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished_run("both")
    line, = (run.line() for run in finished_runs())
    assert [line[f"before-{k}"] for k in (1, 2, 3, 4)] == ["15.00", "35.00", "55.00", "75.00"]
    assert [line[f"after-{k}"] for k in (1, 2, 3, 4)] == ["30.00", "70.00", "110.00", "150.00"]
    assert (line["last"], line["best_validation"], line["seconds"], line["commit"]) == ("5.0", "", "3", "")
    assert (line["before_decay"], line["labeled"]) == ("25.0", "1.25")        # digits decays after 600 of 800 steps
    assert "15.00 → 30.00" in tables([line])["telemetry"] and "+45.00" in tables([line])["telemetry"]


def test_a_run_without_a_quarter_of_its_pseudo_labels_is_left_out_of_their_table():
    quarters = {f"{when}-{k}": value for when, value in (("before", "10"), ("after", "12")) for k in (1, 2, 3, 4)}
    whole = {**LINE, "last": "8", **quarters}
    assert "| 1 | 10.00 → 12.00 |" in tables([whole, {**whole, "seed": "2", "after-1": "99", "after-3": ""}])["telemetry"]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the reports, in which no run is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: pytest.fail(f"{command} was started"))
    for name in ("README.md", "REPRODUCTION.md"):
        (tmp_path / name).write_text("<!-- digits -->\n<!-- end -->\n<!-- paired -->\n<!-- end -->\n")
    return tmp_path


def test_a_scale_that_leaves_no_step_between_milestones_is_one_line(checkout, capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(["ablation", "--dataset", "digits", "--rows", "both", "--scale", "0.001", "--dry-run"])
    assert "argument --scale: 0.001 leaves no step between the milestones of digits: give more" in capsys.readouterr().err


def test_only_publish_changes_a_file_outside_the_run_folders(checkout, capsys):
    finished_run("both"), finished_run("supervised")
    before = files(checkout)
    command = ["main", "--dataset", "digits", "--scale", "0.01"]
    assert reproduce.main(command) == 0 and files(checkout) == before
    out = capsys.readouterr().out
    assert "| both (MetaSemi) | 1 | 5.00 |" in out and "not published: --publish writes these runs to" in out
    assert reproduce.main([*command, "--publish"]) == 0
    written = {path for path, content in files(checkout).items() if before.get(path) != content}
    assert written == {"README.md", "REPRODUCTION.md", "results/runs.csv", "splits/SHA256SUMS", "splits/digits-50-seed1.txt"}
    assert set(capsys.readouterr().out.splitlines()[-1].split()) == {"published", "in", *written}
    assert "| both (MetaSemi) | 1 | 5.00 |" in (checkout / "README.md").read_text()


def test_what_is_published_are_the_runs_of_the_command_beside_those_published_before(checkout):
    for seed in (1, 2):
        finished_run("both", seed), finished_run("supervised", seed)
    lines = [{**LINE, "last": "7.5"}, {**LINE, "cell": "digits", "scale": "0.01", "last": "99", "commit": "older"}]
    with open(checkout / "results" / "runs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    assert reproduce.main(["main", "--dataset", "digits", "--scale", "0.01", "--publish"]) == 0
    runs = published.read_runs()
    assert [(run["cell"], run["row"], run["seed"], run["last"]) for run in runs] == [
        ("cifar10", "both", "1", "7.5"), ("digits", "both", "1", "5.0"), ("digits", "supervised", "1", "5.0")]


def test_finished_runs_of_an_older_commit_are_published_with_the_commit_that_made_them(checkout):
    for seed in range(1, 21):
        for row in reproduce.TABLES["ablation"]:
            path = finished_run(row, seed) / "results.json"
            results = json.loads(path.read_text())
            results["sessions"][-1]["commit"] = f"{row}-{seed}"
            for flag in ("consistency", "sync_bn", "compile", "meta_lr" if row != "beta-0" else "ramp"):
                del results["args"][flag]                   # as if they were younger than the run
            path.write_text(json.dumps(results))
            (path.parent / "args.json").write_text(json.dumps({"args": results["args"]}))
    assert reproduce.main(["ablation", "--dataset", "digits", "--scale", "0.01", "--seeds", "20", "--publish"]) == 0
    runs = published.read_runs()
    assert len(runs) == 100 and all(run["commit"] == f"{run['row']}-{run['seed']}" for run in runs)
    assert "| 20 | +0.00 |" in (checkout / "README.md").read_text() and len(published.read_sums()) == 20


def test_a_damaged_run_that_was_begun_is_named_before_any_run_starts(checkout, capsys):
    folder = finished_run("supervised")
    (folder / "results.json").unlink()
    (folder / "args.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["main", "--dataset", "digits", "--scale", "0.01"])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1) and f"{folder}/args.json is damaged" in error


def test_a_run_on_other_labeled_images_than_the_published_ones_is_not_published(checkout, capsys):
    finished_run("neither")
    folder = finished_run("both")
    finished_run("supervised")
    assert reproduce.main(["main", "--dataset", "digits", "--scale", "0.01", "--publish"]) == 0
    (folder / "label_indices.txt").write_text("2\n")
    before = files(checkout)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["main", "--dataset", "digits", "--scale", "0.01", "--publish"])
    assert stop.value.code == 2 and files(checkout) == before
    assert f"{folder}/label_indices.txt is not the list that is published as splits/digits-50-seed1.txt" in (
        capsys.readouterr().err)


def test_the_progress_of_a_run_has_its_step_its_error_and_the_time_left(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("digits", "both", 1, 1.0)
    assert run.progress() == ""
    assert train(run.folder.absolute(), "--total-steps", "6") == 0
    log = run.folder / "log.txt"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines[:-1] if "  step 6/6  test error" not in line))     # as before the last save
    assert re.fullmatch(r"step 6/6, test error \d+\.\d\d %, 0 s left", run.progress())
    log.write_text("".join(line for line in lines if "test error" not in line)[:-30])       # in the middle of its last line
    assert re.fullmatch(r"step 6/6, \d s left", run.progress())


def test_progress_is_printed_every_five_seconds_at_first_and_every_ten_minutes_in_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    now = 0.0
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now)
    progress, times = reproduce.Progress(Run("digits", "both", 1, 1.0)), []
    monkeypatch.setattr(Run, "progress", lambda self: f"{now // 10_000}")
    for now in range(30 * 3600):                            # noqa: B007  a second each
        due, printed = progress.due, progress.printed
        progress.print_if_due()
        if progress.due != due:
            times.append(now)
            assert capsys.readouterr().out == ("" if progress.printed == printed else progress.printed + "\n")
    gaps = np.diff(times)
    assert times[:5] == [5, 10, 15, 20, 25] and gaps.max() == 600 and (np.diff(gaps) >= 0).all() and len(times) < 220


def test_a_run_in_hand_is_seen_while_it_goes_on_and_a_failed_one_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs, seen, environments = [Run("digits", row, 1, 0.01) for row in ("both", "supervised")], Event(), []

    def train(command, env, **options):
        folder = Path(command[command.index("--save-path") + 1])
        (folder / "log.txt").write_text("2026-01-01 00:00:00  step 4/8  test error 50.00 %\n")
        environments.append(env["OMP_NUM_THREADS"])
        seen.wait(60)
        return subprocess.CompletedProcess(command, 1, stderr="train_meta.py: no luck\n")

    monkeypatch.setattr(subprocess, "run", train)
    monkeypatch.setattr(reproduce.Progress, "print_if_due", lambda self: print(self.run.progress()) or seen.set())
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert set(reproduce.run_all(runs, None, 1)) == set(runs) and environments == ["3", "3"]
    out, error = capsys.readouterr()
    assert "step 4/8, test error 50.00 %\n" in out
    assert set(error.splitlines()) == {f"reproduce.py: {run.folder}: exit code 1: train_meta.py: no luck" for run in runs}


@pytest.mark.parametrize(("affinity", "limits", "available"), [
    (6, {}, 6), (6, {"cpu.max": "max 100000\n"}, 6), (6, {"cpu.max": "350000 100000\n"}, 3),
    (2, {"cpu.max": "350000 100000"}, 2), (6, {"cpu.max": "50000 100000"}, 1),
    (6, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
    (6, {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4)])
def test_jobs_divide_the_cpus_that_the_affinity_and_the_container_leave(tmp_path, monkeypatch, affinity, limits, available):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(affinity)))
    monkeypatch.setattr(reproduce, "CGROUP", tmp_path)
    (tmp_path / "cpu").mkdir()
    for name, text in limits.items():
        (tmp_path / name).write_text(text)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert reproduce.available_cpus() == available
    assert [reproduce.cpu_environment(jobs) for jobs in (1, 2, 99)] == [
        {"OMP_NUM_THREADS": str(count)} for count in (available, max(1, available // 2), 1)]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert reproduce.cpu_environment(2) == {}


def test_the_commands_of_the_reports_publish_what_they_tell_of():
    lines = [line for name in ("README.md", "REPRODUCTION.md")
             for line in re.findall(r"(?:^    |`)python3 reproduce.py ([^`\n]*)", (ROOT / name).read_text(), re.MULTILINE)]
    plans = [reproduce.parse(shlex.split(line)) for line in lines]
    assert len(plans) >= 10 and all(plan.publish == (plan.table in ("main", "ablation")) for plan in plans)


def test_utils_knows_nothing_of_the_reproduction():
    for path in (ROOT / "utils").glob("*.py"):
        assert not re.search(r"^\s*(from|import) reproduc", path.read_text(), re.MULTILINE), path


def test_results_of_another_experiment_are_no_row_and_no_finished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "run_all", lambda runs, *args: pytest.fail(str(runs)))
    folder = finished_run("both")
    (folder / "results.json").write_bytes((finished_run("supervised") / "results.json").read_bytes())
    for command in (["main", "--dataset", "digits", "--scale", "0.01"], ["ablation", "--dataset", "digits"]):
        with pytest.raises(SystemExit) as stop:
            reproduce.main(command)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{folder}/results.json is of another experiment than both of digits: --num" in error
    assert not (tmp_path / "results" / "runs.csv").exists()


def test_a_resume_takes_results_only_for_its_own(train, tmp_path, capsys):
    assert train("a") == 0 and train("b", "--no-meta", "--total-steps", "2") == 0
    path = tmp_path / "a" / "results.json"
    own = path.read_bytes()
    for content in ((tmp_path / "b" / "results.json").read_bytes(), own[:-30], own.replace(b'"steps": 7', b'"steps": 6')):
        path.write_bytes(content)
        capsys.readouterr()
        assert train("a", "--resume") == 0
        assert "(median of all 3 evaluations)" in capsys.readouterr().out
        assert all(json.loads(path.read_bytes())[key] == json.loads(own)[key] for key in ("error_rate", "steps", "args"))
        assert json.loads(path.read_bytes())["median_of"] == 3
    before = path.stat().st_mtime_ns
    assert train("a", "--resume") == 0 and "finished at step 7" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before


def test_the_column_says_what_the_median_is_over():
    short, long = {**LINE, "cell": "digits", "last": "9"}, {**LINE, "last": "9"}
    blocks = tables([short, long])
    assert "| median of all 8 evaluations |" in blocks["digits"] and "last 20" not in blocks["digits"]
    assert "| median of the last 20 evaluations |" in blocks["cifar10"]
    assert "| 8.00 (of all 8) |" in blocks["cells"] and "| 8.00 |" in blocks["cells"]
    assert [median_name(count) for count in (1, 20, 21)] == [
        "median of the only evaluation", "median of all 20 evaluations", "median of the last 20 evaluations"]


def test_the_sources_name_the_encoding_of_every_text_file():
    for path in {*ROOT.rglob("*.py")} - {*(ROOT / ".venv").rglob("*"), *(ROOT / "tests").rglob("*")}:
        for node in ast.walk(ast.parse(path.read_bytes())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in ("open", "os.fdopen") or name.endswith((".read_text", ".write_text")):
                binary = name == "open" and len(node.args) > 1 and "b" in ast.unparse(node.args[1])
                assert binary or any(word.arg == "encoding" for word in node.keywords), f"{path}, line {node.lineno}"


def test_paired_differences_are_taken_seed_by_seed():
    errors = {"both": {1: 10.0, 2: 20.0, 3: 33.0, 4: 7.0}, "neither": {3: 36.0, 2: 22.0, 1: 11.0, 5: 0.0}}
    lines = [{**LINE, "cell": "digits", "row": row, "seed": str(seed), "last": str(error)}
             for row, seeds in errors.items() for seed, error in seeds.items()]
    line, = [line for line in tables(lines)["paired"].splitlines() if "digits" in line]
    # of -1, -2 and -3: standard error 1 / sqrt(3), t(0.975; 2) = 4.303
    assert "| both (MetaSemi) less neither (supervised baseline) | at the end | 3 | -2.00 | -4.48 to +0.48 | 0.074 |" in line
    assert line.endswith("| cannot tell |")
    lines += [{**lines[0], "row": row, "seed": "6", "last": error} for row, error in (("both", "5.0"), ("neither", "7.0"))]
    line, = [line for line in tables(lines)["paired"].splitlines() if "digits" in line]
    assert "| 4 | -2.00 | -3.30 to -0.70 | 0.016 | lower |" in line


def test_the_paired_differences_of_one_cell_are_those_of_its_largest_scale():
    errors = {("1", "both"): (1, 2), ("1", "neither"): (3, 5), ("0.5", "both"): (1, 1), ("0.5", "neither"): (2, 9)}
    blocks = tables([{**LINE, "cell": "digits", "scale": scale, "row": row, "seed": str(seed), "last": str(error)}
                     for (scale, row), values in errors.items() for seed, error in enumerate(values)])
    head, rule, largest, smaller = blocks["paired"].splitlines()
    assert "| digits, 50 labels | 1 | both" in largest and "| 2 | -2.50 |" in largest and "| 0.5 | both" in smaller
    without_cell_and_scale = ["| " + row.split(" | ", maxsplit=2)[2] for row in (head, rule, largest)]
    assert blocks["paired-digits"].splitlines() == without_cell_and_scale
    assert blocks["paired-svhn"] == tables([])["paired"] and blocks["paired-svhn"].startswith("None yet: ")
    assert all(f"paired-{name}" in blocks for name in CELLS)


def test_killed_at_random_it_continues_repeats_nothing_and_reports_the_same(tmp_path):
    command = [sys.executable, ROOT / "reproduce.py", "main", "--dataset", "digits", "--scale", "0.02", "--jobs", "2",
               "--publish"]
    rng, environment = np.random.default_rng(int.from_bytes(os.urandom(4))), {**os.environ, "OMP_NUM_THREADS": "1"}
    reports = {}
    for name in ("whole", "parts"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "REPRODUCTION.md").write_text("<!-- cells -->\n<!-- end -->\n<!-- telemetry -->\n<!-- end -->\n")
        done = {}
        for _ in range(2 if name == "parts" else 0):
            process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, env=environment)
            time.sleep(rng.uniform(0.5, 6))
            process.kill()
            process.wait()
            done = {path: path.stat().st_mtime_ns for path in folder.rglob("results.json")}
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        assert (finished.returncode, finished.stderr) == (0, "")
        assert all(path.stat().st_mtime_ns == moment for path, moment in done.items())
        lines = list(csv.DictReader(io.StringIO((folder / "results" / "runs.csv").read_text())))
        assert [line["row"] for line in lines] == ["both", "supervised"]
        for line in lines:
            line["seconds"] = "0"
        reports[name] = tables(lines)
        assert "| 0.02 | 16 | 1 |" in (folder / "REPRODUCTION.md").read_text()
    assert reports["whole"] == reports["parts"]


def test_the_shipped_lists_are_those_that_the_seeds_give_and_a_changed_one_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    digits = load_dataset("digits", ".")
    sums = published.read_sums()
    assert set(sums) == {path.name for path in (ROOT / "splits").glob("*.txt")}
    for name, value in sums.items():
        text = (ROOT / "splits" / name).read_bytes()
        assert published.sha256(text) == value
        data, count, seed = re.fullmatch(r"(.+)-(\d+)-seed(\d+)\.txt", name).groups()
        assert len(set(text.split())) == int(count)
        assert any((cell.data_name, cell.num_label) == (data, int(count)) for cell in CELLS.values())
        if data == "digits":
            labeled, _ = split_labels(digits.train_labels, int(count), 10, int(seed))
            assert [int(index) for index in text.split()] == labeled.tolist()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "digits-50-seed1.txt").write_text("1\n")
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["main", "--dataset", "digits"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "splits/digits-50-seed1.txt is not the list whose SHA-256 is in splits/SHA256SUMS: restore it" in error


def test_imagenet_is_a_plan_with_its_cost_of_the_recipe_in_the_documents(capsys):
    assert reproduce.main(["imagenet", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert "| both (MetaSemi) | 3e+19 | 30.4 | 3.8 |" in out            # 2 * 1.82e9 * 512 * 12 * 1351200 / 276.5e12 / 3600
    assert "| neither (supervised baseline) | 8.4e+17 | 0.8 | 0.1 |" in out         # 2 * 1.82e9 * 512 * 3 * 150000
    planned = [flags_of(line) for line in out.splitlines() if line.startswith("torchrun")]
    recipe = flags_of(re.search(r"python3 (train_meta.py --dataset imagenet .*)", (ROOT / "docs" / "usage.md").read_text())[1])
    free = ("data_path", "save_path", "resume", "precision", "print_freq", "test_freq", "seed", "num_workers")
    assert [(flags["total_steps"], flags["warmup"]) for flags in planned[::2]] == [
        (600 * 128_000 // 512, 5 * 128_000 // 512), (1_351_200, 11_260), (1_351_200, 11_260)]
    assert all(flags["sync_bn"] for flags in planned)
    assert len(planned) == 6 and {k: v for k, v in recipe.items() if k not in free} in [
        {k: v for k, v in flags.items() if k not in free} for flags in planned]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["imagenet", "--dataset", "digits"])
    assert stop.value.code == 2 and "--dataset: without effect with the table imagenet" in capsys.readouterr().err


def test_every_row_of_the_paper_is_there():
    assert set(ABLATION) < set(ROWS) and all(set(CELLS[name].published) == {*ABLATION, "supervised"}
                                             for name in ("svhn", "cifar10", "cifar100"))
    assert [CELLS[name].published["both"] for name in ("svhn", "cifar10", "cifar100")] == [3.15, 7.78, 30.74]
