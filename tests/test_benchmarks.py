"""The benchmarks run, at a tiny size on the CPU."""
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402


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
    operations = {row[1]: int(row[-1].replace(",", "")) for row in table if row[0] == "convlarge" and len(row) == 9}
    assert operations["supervised"] < 150 < operations["float32"]


def test_a_check_that_fails_is_a_line_and_the_others_go_on(monkeypatch, capsys):
    right = gpu_check.Trainer.gradient

    def scaled(self, **more):
        return right(self, **more) * (2 if self.options is gpu_check.VARIANTS["bfloat16"] else 1)

    monkeypatch.setattr(gpu_check.Trainer, "gradient", scaled)
    assert gpu_check.main(["--device", "cpu", "--archs", "convlarge", "--parts", "exactness", "waits"]) == 1
    (_, failed), (_, passed) = (row for row in rows(capsys.readouterr().out) if row[0] == "convlarge")
    assert failed.startswith("FAILED: float32 ") and passed.startswith("done")
