"""The plan, the queue and the report of reproduce.py."""
import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from helpers import finished_run

import reproduce
from datasets import load_dataset
from datasets.splits import split_labels
from reproduction import published
from reproduction.cells import CELLS, row_of
from reproduction.report import contrast, filled, tables
from reproduction.run import COLUMNS, EVALUATION_COLUMNS, Run
from utils.experiment import resolve_flags
from utils.files import csv_text

LINE = {key: "" for key in COLUMNS} | {
    "cell": "cifar10", "row": "both", "seed": "1", "scale": "1", "steps": "400000", "median_last_20": "8", "best_test": "7",
    "seconds": "3600", "device": "gpu", "threads": "1", "precision": "float32", "torch": "2", "commit": "a" * 40}


def flags_of(line):
    words = shlex.split(line, comments=True)
    return vars(resolve_flags(words[words.index("train_meta.py") + 1:])[0])


def commands(out):
    """The flags of the commands that a dry run prints; its other lines are comments."""
    lines = out.splitlines()
    assert all(line.startswith(("python3 train_meta.py ", "# ")) for line in lines)
    return [flags_of(line) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("table", ["main", "ablation", "figure3", "curves"])
def test_a_dry_run_prints_commands_that_are_accepted_and_does_nothing(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert reproduce.main([table, "--dataset", *CELLS, "digits", "--seeds", "2", "--scale", "0.01", "--dry-run"]) == 0
    plan = commands(capsys.readouterr().out)
    assert len(plan) == 2 * len(CELLS) * len(reproduce.TABLES[table]) and not list(tmp_path.iterdir())
    assert len({str(flags["save_path"]) for flags in plan}) == len(plan)
    cifar = [flags for flags in plan if flags["dataset"] == "cifar10" and flags["arch"] == "convlarge"]
    assert all((flags["total_steps"], flags["warmup"], flags["test_freq"], flags["milestones"]) == (4000, 40, 4, [3000, 3500])
               for flags in cifar)


def test_the_commands_of_the_tables_are_those_of_the_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for table in (["main"], ["ablation"], ["main", "--dataset", "imagenet", "--first-seed", "1234"]):
        reproduce.main([*table, "--dry-run"])
    free = ("data_path", "save_path", "resume", "split", "precision", "print_freq", "test_freq", "num_workers")
    planned = [{k: v for k, v in flags.items() if k not in free} for flags in commands(capsys.readouterr().out)]
    lines = re.findall(r"^    .*python3 (train_meta.py .*(?:--save-path results/(?:svhn|cifar)|--dataset imagenet).*)$",
                       "".join((ROOT / name).read_text() for name in ("README.md", "docs/usage.md")), re.MULTILINE)
    assert len(lines) == 8
    for line in lines:
        assert {k: v for k, v in flags_of(line).items() if k not in free} in planned, line


def test_the_reports_are_what_runs_csv_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = published.read_lines(published.RUNS)
    assert len(lines) >= 4 and [published.order(line) for line in lines] == sorted(map(published.order, lines))
    evaluations, runs = published.read_lines(published.EVALUATIONS), {published.run_of(line): line for line in lines}
    for run, last in {published.run_of(line): line for line in evaluations}.items():
        assert (last["step"], float(last["test_error"])) == (runs[run]["steps"], float(runs[run]["last"])), run
    blocks = tables(lines, evaluations)
    for path in published.REPORTS:
        text = path.read_text()
        assert filled(path, blocks) == text, f"{path} is behind results/runs.csv: python3 reproduce.py ablation ... --publish"


@pytest.mark.parametrize(("errors", "verdict"), [
    ([7.7, 7.8, 7.9], "within the band"), ([9.0, 9.1, 9.2], "worse"), ([6.9, 7.0, 7.1], "better"), ([8.0], "worse")])
def test_the_verdict_compares_with_one_more_run(errors, verdict):
    paper = tables([{**LINE, "seed": str(i), "last": str(error)} for i, error in enumerate(errors)])["paper"]
    mean = f"{np.mean(errors):.2f}" + (f" ± {np.std(errors, ddof=1):.2f}" if len(errors) > 1 else "")
    row = next(row for row in paper.splitlines() if row.startswith("| MetaSemi |"))
    assert f"| 7.78 | {mean} (n = {len(errors)}): {np.mean(errors) - 7.78:+.2f}, {verdict} |" in row
    assert "| 3.15 | not run yet |" in row and "| 30.74 | not run yet |" in row
    assert f"| {CELLS['cifar10'].title}: paper | this code |" in paper


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the reports, in which no run is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: pytest.fail(f"{command} was started"))
    for name in ("README.md", "REPRODUCTION.md"):
        (tmp_path / name).write_text("<!-- digits -->\n<!-- end -->\n<!-- paired-digits -->\n<!-- end -->\n")
    return tmp_path


def test_only_publish_changes_a_file_outside_the_run_folders(checkout, capsys):
    finished_run("both"), finished_run("supervised")
    before = files(checkout)
    command = ["main", "--dataset", "digits", "--scale", "0.01"]
    assert reproduce.main(command) == 0 and files(checkout) == before
    out = capsys.readouterr().out
    assert "| MetaSemi | 1 | 5.00 |" in out and "not published: --publish writes these runs to" in out
    assert reproduce.main([*command, "--publish"]) == 0
    written = {path for path, content in files(checkout).items() if before.get(path) != content}
    assert written >= {"README.md", "REPRODUCTION.md", "results/runs.csv", "results/evaluations.csv",
                       "splits/digits-50-seed1.txt"}
    assert set(capsys.readouterr().out.splitlines()[-1].split()) == {"published", "in", *written}
    assert "| MetaSemi | 1 | 5.00 |" in (checkout / "README.md").read_text()


def test_what_is_published_are_the_runs_of_the_command_beside_those_published_before(checkout):
    finished_run("both"), finished_run("both", 2), finished_run("supervised")
    older = {**LINE, "cell": "digits", "scale": "0.01", "steps": "9", "last": "99"}
    write(published.RUNS, COLUMNS, [{**LINE, "last": "7.5"}, older])
    write(published.EVALUATIONS, EVALUATION_COLUMNS, [evaluation({**LINE, "last": "7.5"}), evaluation(older)])
    assert reproduce.main(["main", "--dataset", "digits", "--scale", "0.01", "--publish"]) == 0
    runs = published.read_lines(published.RUNS)
    assert [(run["cell"], run["row"], run["seed"], run["last"]) for run in runs] == [
        ("cifar10", "both", "1", "7.5"), ("digits", "both", "1", "5.0"), ("digits", "supervised", "1", "5.0")]
    assert (runs[1]["before_decay"], runs[1]["labeled"]) == ("25.0", "1.25")        # digits decays after 600 of 800 steps
    assert [tuple(line.values())[:6] for line in published.read_lines(published.EVALUATIONS)] == [
        ("cifar10", "both", "1", "1", "400000", "7.5"),
        *(("digits", row, "1", "0.01", *end) for row in ("both", "supervised") for end in (("6", "25.0"), ("8", "5.0")))]


def write(path, columns, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text(csv_text([columns, *map(dict.values, lines)]))


def evaluation(run):
    """The last evaluation of a run, as its line of runs.csv has it."""
    return {**{key: "" for key in EVALUATION_COLUMNS}, **{key: run[key] for key in ("cell", "row", "seed", "scale")},
            "step": run["steps"], "test_error": run["last"]}


def test_an_evaluation_has_the_means_of_the_log_lines_since_the_one_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = finished_run("both")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [*lines[:6], '{"step": 6, "test/accuracy": 0.75}', *lines[6:8], '{"step": 8, "train/meta-shift": 0.5}',
             '{"step": 8, "test/accuracy": 0.8}']
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [tuple(line.values())[4:] for line in Run("digits", "both", 1, 0.01).lines()[1]] == [
        ("6", "25.0", "17.5000", "35.0000", ""), ("8", "20.0", "37.5000", "75.0000", "0.5000")]


@pytest.mark.parametrize(("path", "change", "message"), [
    (published.RUNS, lambda text: text[:-1], "or not its last line"),
    (published.RUNS, lambda text: text[:-20] + "\n", "is no value for commit"),
    (published.RUNS, lambda text: text.replace(",7.5,", ",750,"), "'750' is no value for last"),
    (published.RUNS, lambda text: text.replace("cifar10", "cifär10").encode("latin-1"), "cannot be read")])
def test_a_file_that_was_cut_or_changed_is_one_line_and_nothing_is_published(checkout, capsys, path, change, message):
    finished_run("both"), finished_run("supervised")
    run = {**LINE, "last": "7.5"}
    last = evaluation(run)
    write(published.RUNS, COLUMNS, [run])
    write(published.EVALUATIONS, EVALUATION_COLUMNS, [{**last, "step": "200000", "test_error": "8"}, last])
    changed = change(path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    before = files(checkout)
    error = refused(capsys, "main", "--dataset", "digits", "--scale", "0.01", "--publish")
    assert str(path) in error and message in error and files(checkout) == before


def test_finished_runs_of_an_older_commit_are_published_with_the_commit_that_made_them(checkout):
    for i, row in enumerate(reproduce.TABLES["main"]):
        path = finished_run(row) / "results.json"
        results = json.loads(path.read_text())
        results["sessions"][-1]["commit"] = str(i) * 40
        results["args"]["compile"] = False                  # a flag that is no more
        del results["args"]["consistency"]                  # as if it were younger than the run
        path.write_text(json.dumps(results))
        (path.parent / "args.json").write_text(json.dumps({"args": results["args"]}))
    assert reproduce.main(["main", "--dataset", "digits", "--scale", "0.01", "--publish"]) == 0
    assert [run["commit"] for run in published.read_lines(published.RUNS)] == ["0" * 40, "1" * 40]


def test_a_run_on_other_labeled_images_than_the_published_ones_is_not_published(checkout, capsys):
    finished_run("neither")
    folder = finished_run("both")
    finished_run("supervised")
    assert reproduce.main(["main", "--dataset", "digits", "--scale", "0.01", "--publish"]) == 0
    (folder / "label_indices.txt").write_text("2\n")
    before = files(checkout)
    error = refused(capsys, "main", "--dataset", "digits", "--scale", "0.01", "--publish")
    assert f"{folder}/label_indices.txt" in error and "splits/digits-50-seed1.txt" in error and files(checkout) == before


@pytest.mark.parametrize("jobs", [1, 2])
def test_one_run_prints_for_itself_and_what_failed_of_several_says_why(tmp_path, monkeypatch, capsys, jobs):
    started = []

    def fail(command, env, stdout, stderr, start_new_session):
        started.append((env["OMP_NUM_THREADS"], stdout))
        if stderr:
            stderr.write("train_meta.py: no luck\n")
        return SimpleNamespace(returncode=1, poll=lambda: 1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", fail)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(reproduce.joblib, "cpu_count", lambda: 6)
    runs = [Run("digits", row, 1, 0.01) for row in ("both", "supervised")]
    assert set(reproduce.run_all(runs, None, jobs)) == set(runs)
    assert started == [("6", None) if jobs == 1 else ("3", subprocess.DEVNULL)] * 2
    why = "" if jobs == 1 else ": train_meta.py: no luck"
    assert set(capsys.readouterr().err.splitlines()) == {f"reproduce.py: {run.folder}: exit code 1{why}" for run in runs}


def refused(capsys, *flags):
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit, match="2"):
        reproduce.main([*flags])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_run_that_starts_from_another_one_waits_until_that_is_finished(checkout, capsys):
    error = refused(capsys, "ablation", "--dataset", "cifar10-jpeg-500-from-mix-up", "--rows", "both", "--first-seed", "12")
    assert "starts from a run that is not finished: python3 reproduce.py ablation" in error
    remedy = reproduce.parse(shlex.split(error)[shlex.split(error).index("reproduce.py") + 1:])
    assert (remedy.dataset, remedy.rows, remedy.first_seed) == (["cifar10-jpeg-500-start"], ["mix-up"], 12)


def test_the_rows_of_an_experiment_of_ones_own_have_its_flags_but_for_those_without_effect(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = "--dataset digits --num-label 50 --weight 2 --include-labeled --milestones '[3, 4]' --data-path 'my photos'"
    assert reproduce.main(["ablation", "--flags", own, "--seeds", "2", "--first-seed", "5", "--dry-run"]) == 0
    plan = commands(capsys.readouterr().out)
    assert [(flags["seed"], row_of(flags)) for flags in plan] == [
        (seed, row) for seed in (5, 6) for row in reproduce.TABLES["ablation"]]
    assert [(flags["weight"], flags["include_labeled"]) for flags in plan[:5]] == [
        (1, False), (2, True), (1, True), (2, True), (2, True)]
    assert all((str(flags["data_path"]), flags["milestones"]) == ("my photos", [3, 4]) for flags in plan)
    assert len({str(flags["save_path"]) for flags in plan}) == 10


def sweep(tmp_path):
    """Folders of runs: two learning rates, two seeds each."""
    folders = []
    for i, (lr, seed, error) in enumerate(((0.1, 1, 10.0), (0.1, 2, 12.0), (0.2, 1, 13.0), (0.2, 2, 16.0))):
        folder = finished_run("both", 10 + i)
        results = json.loads((folder / "results.json").read_text())
        results["args"] |= {"lr": lr, "seed": seed, "split": f"splits/{i}.txt"}
        results["error_rate"]["last"], results["evaluations"] = error, 2
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "args.json").write_text(json.dumps({"args": results["args"]}))
        (folder / "split.json").write_text(json.dumps({"sha256": str(seed), "labels_sha256": "x"}))
        folders.append(str(folder))
    return folders


def test_a_table_of_any_runs_has_a_row_for_each_setting_and_differences_on_the_same_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = sweep(tmp_path)
    assert reproduce.main(["table", *folders]) == 0
    head, _, first, second, _, _, _, difference = capsys.readouterr().out.splitlines()
    assert head.startswith("| --lr | n | last | median of the last 20 evaluations, or all | lowest")
    assert first.startswith("| 0.1 | 2 | 11.00 ± 1.41 |") and second.startswith("| 0.2 | 2 | 14.50 ± 2.12 |")
    assert difference.startswith("| --lr 0.2 less --lr 0.1 | 2 | +3.50 | -2.85 to +9.85 |")     # of 3 and 4: 0.5 * 12.706
    assert reproduce.main(["table", "--format", "csv", *folders]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out.partition("\n\n")[0])))
    assert [(row["--lr"], row["last"], row["last, standard deviation"]) for row in rows] == [
        ("0.1", "11.00", "1.41"), ("0.2", "14.50", "2.12")]
    assert reproduce.main(["table", *folders, "--format", "latex"]) == 0
    assert r"0.1 & 2 & 11.00 $\pm$ 1.41 & " in capsys.readouterr().out
    (Path(folders[0]) / "results.json").unlink()
    for runs, message in ((folders, f"{folders[0]} holds a run that is not finished"),
                          ([folders[1]] * 2, "are the same run, seed 2"), (["results"], "results/args.json cannot be read")):
        assert message in refused(capsys, "table", *runs)


@pytest.mark.parametrize(("differences", "verdict"), [
    ([-2.0, -2.2, -2.4], "lower"), ([0.3, 0.4, 0.5], "higher"), ([0.3, -0.3, 0.0], "no difference that matters"),
    ([0.5, -0.5, 0.0], "cannot tell"), ([-3.0, 0.0], "cannot tell"), ([0.0, 0.0], "cannot tell")])
def test_the_verdict_on_a_difference_is_that_of_the_protocol(differences, verdict):
    assert contrast(differences)[-1] == verdict


def test_the_course_is_paired_by_seed_at_a_few_steps_and_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs, lines = [], []
    for row, level in (("mix-up", 60), ("both", 58)):
        for seed in (1, 2, 3):
            shown = {"before": "40", "after": "41.5", "meta_shift": "0.25"} if seed < 3 else {}
            run = {**LINE, "cell": "digits", "row": row, "seed": str(seed), "steps": "800"}
            for step in range(100, 900, 100):
                run["last"] = str(level - step / 100 * (row == "both") * seed + seed)
                lines.append({**evaluation(run), "step": str(step), **shown})
            runs.append(run)
    write(published.RUNS, COLUMNS, sorted(runs, key=published.order))
    write(published.EVALUATIONS, EVALUATION_COLUMNS, sorted(lines, key=published.order))
    blocks = tables(published.read_lines(published.RUNS), published.read_lines(published.EVALUATIONS))
    rows = [row.split(" | ") for row in blocks["course-digits"].splitlines()[2:]]
    assert [row[1:4] for row in rows] == [[str(step), "3", f"{-2 - step / 50:+.2f}"] for step in (100, 200, 400, 600, 700, 800)]
    assert rows[0][-3:] == ["- → -", "-", "- |"]
    two = tables(runs, [line for line in lines if line["seed"] != "3"])["course-digits"].splitlines()[2]
    assert two.endswith("| 40.00 → 41.50 | 40.00 | 0.2500 |")
    assert reproduce.main(["differences", "--dataset", "digits"]) == 0
    assert capsys.readouterr().out == "images/differences-digits.png\n" and Path("images/differences-digits.png").exists()


def test_the_four_arms_of_a_start_and_a_continuation_are_contrasted_by_seed():
    errors = {("both", "both"): 50, ("both", "mix-up"): 52, ("mix-up", "both"): 55, ("mix-up", "mix-up"): 59}
    lines = [{**LINE, "cell": f"cifar10-jpeg-500-from-{start}", "row": row, "seed": str(seed), "last": str(error + seed)}
             for (start, row), error in errors.items() for seed in (11, 12, 13) if (row, seed) != ("mix-up", 13)]
    rows = [row.split(" | ") for row in tables(lines)["start"].splitlines() if " | 2 | " in row]
    assert [row[-1] for row in rows[:4]] == ["61.50 |", "63.50 |", "66.50 |", "70.50 |"]
    assert [row[2] for row in rows[4:]] == ["-5.00", "-7.00", "-6.00", "-2.00", "-4.00", "-3.00"]


def test_paired_differences_are_taken_seed_by_seed():
    errors = {"both": {1: 10.0, 2: 20.0, 3: 33.0, 4: 7.0}, "neither": {3: 36.0, 2: 22.0, 1: 11.0, 5: 0.0}}
    lines = [{**LINE, "cell": "digits", "row": row, "seed": str(seed), "last": str(error)}
             for row, seeds in errors.items() for seed, error in seeds.items()]
    line = tables(lines)["paired-digits"].splitlines()[2]
    # of -1, -2 and -3: standard error 1 / sqrt(3), t(0.975; 2) = 4.303
    assert "| MetaSemi less supervised baseline | at the end | 3 | -2.00 | -4.48 to +0.48 | 0.074 |" in line
    assert line.endswith("| cannot tell |")
    lines += [{**lines[0], "row": row, "seed": "6", "last": error} for row, error in (("both", "5.0"), ("neither", "7.0"))]
    line = tables(lines)["paired-digits"].splitlines()[2]
    assert "| 4 | -2.00 | -3.30 to -0.70 | 0.016 | lower |" in line


def test_the_blocks_of_one_cell_are_those_of_its_largest_scale():
    errors = {("1", "both"): (1, 2), ("1", "neither"): (3, 5), ("0.5", "both"): (1, 1), ("0.5", "neither"): (2, 9)}
    blocks = tables([{**LINE, "cell": "digits", "scale": scale, "row": row, "seed": str(seed), "last": str(error)}
                     for (scale, row), values in errors.items() for seed, error in enumerate(values)])
    _, _, paired = blocks["paired-digits"].splitlines()
    assert "| 2 | -2.50 |" in paired and "| 1.50 ± 0.71 |" in blocks["digits"] and "| 1.00 ± 0.00 |" in blocks["cells"]
    assert blocks["paired-svhn"].startswith("None yet: ") and blocks["svhn"] == "Not run yet."
    assert "| median of the last 20 evaluations, or all |" in blocks["digits"]
    blocks = tables([{**LINE, "scale": "0.05", "steps": "20000", "last": "10"}])           # never beside a published value
    assert "| 0.05 | 20000 | gpu, 1 thread(s), float32, torch 2 | aaaaaaaaaa | 1 | 10.00 |" in blocks["cells"]
    assert "10.00" not in blocks["paper"] and "scale 0.05" in blocks["commands"]


def test_stopped_by_a_signal_its_runs_save_and_it_continues_and_repeats_nothing(tmp_path):
    command = [sys.executable, ROOT / "reproduce.py", "main", "--dataset", "digits", "--scale", "0.15", "--publish"]
    rng, environment = np.random.default_rng(), {**os.environ, "OMP_NUM_THREADS": "1"}
    (tmp_path / "REPRODUCTION.md").write_text("<!-- cells -->\n<!-- end -->\n")
    for number, code, jobs in ((signal.SIGTERM, 143, "1"), (signal.SIGINT, 130, "2")):
        with open(tmp_path / "out", "w") as out:
            process = subprocess.Popen([*command, "--jobs", jobs], cwd=tmp_path, stdout=out, stderr=subprocess.PIPE, text=True,
                                       env=environment, start_new_session=True)
        while process.poll() is None and "supervised-1: " not in (tmp_path / "out").read_text():
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 2))
        os.killpg(process.pid, number)                      # as a terminal does
        _, error = process.communicate(timeout=600)
        done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
        if process.returncode or number == signal.SIGTERM:  # else it had ended before
            assert process.returncode == code and error.endswith("reproduce.py: interrupted\n")
            assert all("stopped by" in path.read_text() or "  step " not in path.read_text()
                       or path.with_name("results.json") in done for path in tmp_path.rglob("log.txt"))
            assert number == signal.SIGINT or not any(path.parent.name == "both-1" for path in done)    # it was not waited out
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert all(path.stat().st_mtime_ns == moment for path, moment in done.items())
    lines = list(csv.DictReader(io.StringIO((tmp_path / "results" / "runs.csv").read_text())))
    assert [line["row"] for line in lines] == ["both", "supervised"]
    assert "| 0.15 | 120 | " in (tmp_path / "REPRODUCTION.md").read_text()


def test_the_shipped_lists_are_those_that_the_seeds_give():
    digits = load_dataset("digits", ".")
    for path in (ROOT / "splits").glob("*.txt"):
        data, count, seed = re.fullmatch(r"(.+)-(\d+)-seed(\d+)", path.stem).groups()
        indices = [int(index) for index in path.read_text().split()]
        assert len(set(indices)) == int(count)
        assert any((cell.data_name, cell.num_label) == (data, int(count)) for cell in CELLS.values())
        assert data != "digits" or indices == split_labels(digits.train_labels, int(count), 10, int(seed))[0].tolist()


def test_the_dry_run_of_imagenet_has_its_cost(capsys):
    assert reproduce.main(["main", "--dataset", "imagenet", "--rows", "neither", "both", "--dry-run"]) == 0
    # 2 * 1.82e9 * 512 * (3 * 150000 + 12 * 1351200) FLOP, at 276.5e12 a second
    assert "# imagenet: 2 runs, 3.1e+19 FLOP, 31 hours one after the other at 2.8e+14" in capsys.readouterr().out
