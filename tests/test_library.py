"""The package on its own: built as a wheel, installed alone, and the examples that show it."""
import re
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import torch
from conftest import ROOT
from oracle import close
from torch import nn

import metasemi

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
import own_loop  # noqa: E402


def test_a_wheel_of_the_package_alone_runs_the_loop_of_the_example(tmp_path):
    tree = tmp_path / "tree"                    # building writes into the tree
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "data", "results", "images", "tests"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
                    "--wheel-dir", tmp_path, tree], check=True, capture_output=True, text=True)
    wheel, = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"metasemi", f"metasemi-{metasemi.__version__}.dist-info"}
    assert {name for name in names if name.endswith((".py", ".typed"))} == {
        f"metasemi/{path.name}" for path in (ROOT / "metasemi").iterdir() if path.is_file()}
    metadata = zipfile.ZipFile(wheel).read(f"metasemi-{metasemi.__version__}.dist-info/METADATA").decode()
    assert [line for line in metadata.splitlines() if line.startswith("Requires-Dist")] == ["Requires-Dist: torch>=2.6"]

    shutil.copy(EXAMPLES / "own_loop.py", tmp_path / "alone.py")
    code = ("import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2])['main'](steps=3); import metasemi;"
            "assert metasemi.__file__.startswith(sys.argv[1]), metasemi.__file__")
    done = subprocess.run([sys.executable, "-I", "-c", code, wheel, tmp_path / "alone.py"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "test accuracy" in done.stdout, done.stderr


def test_the_loop_of_the_example_learns(capsys):
    own_loop.main(steps=30)
    last, averaged = (float(value) for value in re.findall(r"weights: (\S+)%", capsys.readouterr().out))
    assert last > 40 and 0 < averaged <= 100                # by chance, 10; the average still holds much of the first weights


SECTIONS = (ROOT / "docs/library.md").read_text().split("\n## ")[1:]
BLOCKS = {section.partition("\n")[0]: re.search(r"```python\n(.*?)```", section, re.DOTALL)[1] for section in SECTIONS}
BETA = 0.3


def names():
    """What a block of docs/library.md finds: a network with batch normalization, its optimizer, and four batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    batches = [(torch.randn(8, 6), torch.randint(3, (8,)), torch.randn(8, 6)) for _ in range(4)]
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.5), "batches": batches, "beta": BETA,
            "device": "cpu"}


def plain(take=lambda optimizer, gradients: None, parts=1, prepare=lambda model: None):
    """The weights after a loop without the library's step; take(optimizer, norm) changes gradients before they are used."""
    found = names()
    model, optimizer = found["model"], found["optimizer"]
    prepare(model)
    for i, (x_l, y_l, x_u) in enumerate(found["batches"], start=1):
        y_tilde, gradient = metasemi.meta_gradient(model, x_l, y_l, x_u)
        y_hat = (y_tilde - BETA * gradient).clamp(min=0)
        y_hat = y_hat / y_hat.sum(dim=1, keepdim=True)
        loss = nn.functional.cross_entropy(model(x_l), y_l) + (model(x_u).softmax(dim=1) - y_hat).square().sum(dim=1).mean()
        (loss / parts).backward()
        if i % parts == 0:
            take(optimizer, torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]).norm())
            optimizer.step()
            optimizer.zero_grad()
    return model


def run(title):
    found = names()
    exec(BLOCKS[title], found)
    return found


def assert_same_model(model, expected, tolerance=100):
    for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert close(value, other, tolerance), name


def test_every_block_of_the_page_is_run_by_a_test():
    assert list(BLOCKS) == ["Is the method right for this network?", "Clipping the gradient", "Accumulating gradients",
                            "float16 with a GradScaler", "Several processes", "Frozen batch normalization",
                            "Networks that return more than logits"]


def test_the_check_of_the_page_finds_nothing_wrong():
    assert run("Is the method right for this network?")["error"] < 1e-8


def test_the_recipe_for_clipping_clips_to_a_norm_of_one():
    def clip(optimizer, norm):
        clipped.append(norm > 1)
        for w in optimizer.param_groups[0]["params"]:
            w.grad /= max(norm, 1.0)

    clipped = []
    assert_same_model(run("Clipping the gradient")["model"], plain(clip))
    assert any(clipped)


def test_the_recipe_for_accumulation_makes_half_the_updates_with_means_of_two_batches():
    assert_same_model(run("Accumulating gradients")["model"], plain(parts=2))


def test_the_recipe_for_a_grad_scaler_is_the_plain_loop_up_to_half_precision():
    model, expected = run("float16 with a GradScaler")["model"], plain()
    for value, other in zip(model.state_dict().values(), expected.state_dict().values()):
        assert (value - other).float().norm() <= 2e-2 * other.float().norm()


def test_the_recipe_for_several_processes_averages_over_them(monkeypatch):
    calls = []
    for name, function in (("get_world_size", lambda: 2), ("all_reduce", lambda t: calls.append(t.shape) or t.mul_(2)),
                           ("broadcast", lambda w, src: calls.append("weights"))):
        monkeypatch.setattr(torch.distributed, name, function)      # two processes that have the same batch
    assert_same_model(run("Several processes")["model"], plain())
    assert calls.count("weights") == 9 and len(calls) == 9 + 4 * (6 + 1 + 6)         # g, the loss, the gradients


def test_the_recipe_for_frozen_batch_normalization_leaves_its_statistics():
    def freeze(model):
        model[1].eval()

    model = run("Frozen batch normalization")["model"]
    assert model[1].num_batches_tracked == 0 and not model[1].training and model[0].training
    assert_same_model(model, plain(prepare=freeze))


def test_the_recipe_for_logits_with_a_name_trains_the_network_inside():
    class Named(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return SimpleNamespace(logits=self.inner(x), features=x)

    found = names()
    exec(BLOCKS["Networks that return more than logits"], found | {"network": Named(found["model"])})
    assert_same_model(found["model"], plain())
