"""The benchmarks run, at a tiny size on the CPU."""
import sys

import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import exactness  # noqa: E402
import gpu_check  # noqa: E402
import same_results  # noqa: E402


def rows(text):
    """Returns the cells of each row of the tables in a text."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
            if line.startswith("| ") and not line.startswith("|---")]


def test_the_check_of_a_device_runs_whole_on_the_cpu(capsys):
    assert gpu_check.main(["--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "No checks failed." in text
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(gpu_check.HEADERS)
    table = rows(text)
    for arch in gpu_check.NARROW:
        said = next(row[1] for row in table if row[0] == arch and row[1].startswith("float32 "))
        errors = dict(entry.split() for entry in said.split(", "))
        assert float(errors["float32"]) < 1e-5 < float(errors["bfloat16"])
        assert float(errors["float32"]) < float(errors["finite-difference"])
        for precision in ("float32", "bfloat16"):
            row = next(row for row in table if row[:2] == [arch, precision])
            assert len(row) == 9 and float(row[2]) > 0 and int(row[-1].replace(",", "")) > 300
    operations = {row[1]: int(row[-1].replace(",", "")) for row in table if row[0] == "convlarge" and len(row) == 9}
    assert operations["supervised"] < 150 < operations["float32"]
    assert all(float(row[1].replace(",", "")) > 0 for row in table if row[0] in ("32x32 in memory", "224x224 from disk"))


def test_a_check_that_fails_is_a_line_and_the_others_go_on(monkeypatch, capsys):
    right = gpu_check.Trainer.gradient

    def gradient(self, **more):
        if self.options is gpu_check.VARIANTS["finite-difference"]:
            raise RuntimeError("out of memory\nand more")
        return right(self, **more)

    def scaled(self, **more):
        return right(self, **more) * (2 if self.options is gpu_check.VARIANTS["bfloat16"] else 1)

    for wrong, said in ((gradient, "FAILED: RuntimeError: out of memory"), (scaled, "FAILED: AssertionError: float32 ")):
        monkeypatch.setattr(gpu_check.Trainer, "gradient", wrong)
        assert gpu_check.main(["--device", "cpu", "--archs", "convlarge", "--parts", "exactness", "waits"]) == 1
        text = capsys.readouterr().out
        (_, failed), (_, passed) = (row for row in rows(text) if row[0] == "convlarge")
        assert failed.startswith(said) and passed.startswith("done") and "1 check failed." in text


def test_a_recording_is_equal_to_itself_and_every_part_of_it_can_differ():
    saved = {"step": 3, "model": {"w": torch.ones(2)}, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
             "rng": [{"cpu": torch.get_rng_state()}], "evaluations": [{"step": 3, "test": 0.5}], "best": 0.5}
    assert list(same_results.differences("a", saved, saved | {"args": {}}, saved)) == []
    for part, other in (("step", 4), ("model", {"w": torch.tensor([1, 1 + 1e-7])}), ("optimizer", {"state": {}}),
                        ("rng", [{"cpu": torch.Generator().manual_seed(0).get_state()}]), ("evaluations", []), ("best", None)):
        fault, = same_results.differences("a", saved, saved | {part: other}, saved)
        assert f", /{part}" in fault
    fault, = same_results.differences("a", {}, saved, ["best"])
    assert fault == "a: there is no best to compare"


def test_the_benchmark_of_exactness_ranks_the_ways_and_draws_them(tmp_path, monkeypatch, capsys):
    name = "WideResNet-10-1"
    monkeypatch.setattr(exactness, "NETWORKS", {name: exactness.NETWORKS[name], "again": exactness.NETWORKS[name]})
    exactness.main([str(tmp_path / "errors.png"), "--steps", "3", "--batch-size", "4"])
    errors = {tuple(row[:2]): float(row[2]) for row in rows(capsys.readouterr().out)[1:]}
    assert errors[name, "exact, float32"] < 1e-4 < errors[name, "finite difference, float32"]
    assert errors[name, "exact, float32"] < errors[name, "exact, bfloat16"]
    assert errors[name, "exact, float32"] == errors["again", "exact, float32"]
    assert (tmp_path / "errors.png").stat().st_size > 0
