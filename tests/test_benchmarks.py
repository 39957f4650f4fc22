"""The benchmarks run, at a tiny size on the CPU."""
import sys
from argparse import Namespace
from functools import partial

import torch
from conftest import ROOT

import models

sys.path.insert(0, str(ROOT / "benchmarks"))
import embedding  # noqa: E402
import exactness  # noqa: E402
import input as input_benchmark  # noqa: E402
import step  # noqa: E402
import streaming  # noqa: E402

TINY = ["--arch", "convsmall", "--batch-size", "4", "--image-size", "16", "--repeats", "1"]


def rows(text):
    return {cells[1]: cells[2:-1] for cells in ([cell.strip() for cell in line.split("|")] for line in text.splitlines())
            if len(cells) > 2}


def test_the_step_benchmark_compares_what_can_run_here_and_says_what_cannot(monkeypatch, capsys):
    networks = dict(models.NETWORKS)                                            # main adds widths to it
    monkeypatch.setattr(models, "NETWORKS", networks)
    monkeypatch.setattr(step, "NETWORKS", networks)
    names = ("plain recipe", "all", "all, bfloat16", "all, CUDA graph")
    monkeypatch.setattr(step, "VARIANTS", {name: step.VARIANTS[name] for name in names})
    monkeypatch.setattr(step, "alone", lambda args, name, **changes: [
        float(word) for word in step.one(Namespace(**vars(args) | changes | {"one": name})).split()])
    product = step.product
    monkeypatch.setattr(step, "product", lambda size, *args: product(64, *args))
    step.main(TINY)
    table = rows(capsys.readouterr().out)
    assert table["plain recipe"][1] == "1.00" and float(table["plain recipe"][-1]) == 0
    assert float(table["all"][-2]) < 1e-5 < float(table["all, bfloat16"][-2]) < 1e-1    # error of the meta-gradient
    assert float(table["all"][-1]) < 1e-3                                               # the update is the plain recipe's
    if not torch.cuda.is_available():
        assert table["all, CUDA graph"][0] == "for CUDA"
    monkeypatch.setattr(step, "alone", lambda args, name, **changes: [
        (1 if isinstance(value, str) else value) ** power for value in changes.values() for power in (1, 2)])
    step.main([*TINY, "--growth"])
    table = rows(capsys.readouterr().out)
    assert table["batch size"] == ["1 / 2 / 4 / 8", "1,000 / 2,000 / 4,000 / 8,000", "1.00", "1 / 4 / 16 / 64", "2.00"]
    assert table["image size"][2] == "1.00" and "parameters" in table


def test_the_input_benchmark_delivers_both_rates(monkeypatch, capsys):
    monkeypatch.setattr(input_benchmark, "SAMPLES", 100)
    input_benchmark.main(["--batch-size", "4", "--repeats", "1"])
    assert float(rows(capsys.readouterr().out)["datasets.Batches"][1]) > 0


def test_the_streaming_benchmark_delivers_both_rates(monkeypatch, capsys):
    monkeypatch.setattr(streaming, "make_tree", partial(streaming.make_tree, images=4))
    streaming.main(["--image-size", "32", "--batch-size", "4", "--num-workers", "1", "--steps", "2", "--repeats", "1"])
    table = rows(capsys.readouterr().out)
    assert float(table["datasets.Batches from disk"][0]) > 0 and float(table["datasets.Batches from disk"][2]) > 1


def test_the_benchmark_of_exactness_ranks_the_ways_and_draws_them(tmp_path, monkeypatch, capsys):
    name = "WideResNet-10-1"
    monkeypatch.setattr(exactness, "NETWORKS", {name: exactness.NETWORKS[name], "again": exactness.NETWORKS[name]})
    exactness.main([str(tmp_path / "errors.png"), "--steps", "3", "--batch-size", "4"])
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    errors = {(cells[0].strip(), cells[1].strip()): float(cells[2]) for cells in table[1:]}
    assert errors[name, "exact, float32"] < 1e-4 < errors[name, "finite difference, float32"]
    assert errors[name, "exact, float32"] < errors[name, "exact, bfloat16"]
    assert errors[name, "exact, float32"] == errors["again", "exact, float32"]
    assert (tmp_path / "errors.png").stat().st_size > 0


def test_the_benchmark_of_the_embedding_times_both_libraries(capsys):
    for backend, name in (("opentsne", "openTSNE"), ("sklearn", "scikit-learn")):
        embedding.main(["--points", "120", "--one", backend])
        (library, (points, _, _, divergence)), = rows(capsys.readouterr().out).items()
        assert library.startswith(name) and points == "120" and 0 < float(divergence) < 5
