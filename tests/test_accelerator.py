"""The method and the scripts on an accelerator that is emulated on the CPU; see `emulator`.

The emulator changes torch everywhere, so one process of its own computes all of this, and the tests compare what it returns.
"""
import contextlib
import io
import json
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch
from helpers import FEW, FLAGS, ROOT, SERVER, differing, few_digits, few_images
from oracle import modalities, random_case, relative_error

import plot_features
import train_meta
from datasets import loading
from metasemi import METHODS, meta_gradient, training_step
from models.convlarge import ConvLarge
from models.resnet import ResNet
from models.shakeshake import ShakeShake
from models.wideresnet import WideResNet

pytestmark = pytest.mark.skipif(not torch.__version__.startswith("2.15."), reason="the emulated device is for torch 2.15 only")
emulator = pytest.importorskip("emulator", exc_type=ImportError)

NETWORKS = {                    # of full depth, since kernels go by that, and narrow
    "convlarge": lambda: ConvLarge(10, width=8, dropout=0.0), "wideresnet": lambda: WideResNet(10, widen=1),
    "shakeshake": lambda: ShakeShake(10, width=4), "resnet18": lambda: ResNet(10, 18)}
ROWS = {"MetaSemi": (True, True), "meta only": (True, False), "mix-up only": (False, True), "supervised": (False, False)}
DIGITS = [*FLAGS, "--print-freq", "99"]


# What the process with the emulated device does

def start():
    emulator.install()
    torch.set_num_threads(1)
    loading.LOADERS["digits"] = few_digits


def model_and_batch(name, device, size=16):
    """A network, or one of `oracle.modalities`, in float64, and a batch of random examples: (model, x_l, y_l, x_u)."""
    if name in NETWORKS:
        torch.manual_seed(1)
        model, batch = NETWORKS[name]().double(), random_case(size, 3, 3, 10)
    else:
        model, *batch = modalities()[name]
        batch = [x[:3] for x in batch]
    return model.to(device), *(x.to(device) for x in batch)


def steps(name, device, row, count, method="jvp", forbid=False):
    """The model after some steps of a row of the ablation; forbid: only the first may wait."""
    model, x_l, y_l, x_u = model_and_batch(name, device)
    meta, mix_up = ROWS[row]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    lam = torch.linspace(0, 1, 3, dtype=x_l.dtype).to(device) if mix_up else None
    for step in range(count):
        with emulator.watch(ROOT, forbid and step > 0):
            torch.manual_seed(step)
            training_step(model, optimizer, x_l, y_l, x_u, alpha=0.1, beta=0.1, weight=0.5, lam=lam, meta=meta, method=method)
    return model


def differences(work, *args):
    """The relative difference of each tensor of work(device, *args), a dict, between the emulated device and the CPU."""
    expected, found = work(torch.device("cpu"), *args), work(emulator.install(), *args)
    assert {t.device.type for t in found.values()} == {"emu"}
    return {name: relative_error(found[name].cpu(), t.double()) for name, t in expected.items()}


def gradients(device, name):
    model, *batch = model_and_batch(name, device)
    return {f"{method} {part}": tensor.detach() for method in METHODS
            for part, tensor in zip(("y_tilde", "gradient"), meta_gradient(model, *batch, method=method, epsilon=1e-4))}


def weights(device, name, row):
    return {key: w.detach() for key, w in steps(name, device, row, 3).state_dict().items()}


def waits(name, row, method):
    """What the host waits for in the second and third step: None, or what is said of the first such wait."""
    try:
        steps(name, emulator.install(), row, 3, method=method, forbid=True)
    except RuntimeError as error:
        return str(error)
    return None


def script(main, *flags, memory=None):
    """(exit code, output, waits) of a script; memory: bytes that images may take, of which 0 leaves them on disk."""
    output, patch = io.StringIO(), contextlib.nullcontext()
    if memory is not None:
        patch = mock.patch("utils.setup.memory_for_images", lambda device: memory)
    try:
        with patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), emulator.watch(ROOT) as seen:
            code = main([*map(str, flags), "--device", "auto"])
    except SystemExit as error:
        code = error.code
    return code, output.getvalue(), seen.waits


@pytest.fixture(scope="module")
def emulated():
    """emulated(function, *args, **options): what the function returns in the process with the emulated device."""
    with ProcessPoolExecutor(1, SERVER, start) as pool:
        yield lambda *call, **options: pool.submit(*call, **options).result(600)


# The method

@pytest.mark.parametrize("name", [*NETWORKS, "token ids"])
def test_the_meta_gradient_by_every_method_equals_that_of_the_cpu(emulated, name):
    found = emulated(differences, gradients, name)
    assert len(found) == 6 and max(found.values()) < 1e-9, found


@pytest.mark.parametrize("row", ROWS)
def test_steps_of_every_row_lead_to_the_weights_of_the_cpu(emulated, row):
    found = emulated(differences, weights, "convlarge", row)
    assert len(found) > 40 and max(found.values()) < 1e-9, found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("row", ROWS)
def test_no_step_but_the_first_waits_for_the_device(emulated, row, method):
    assert emulated(waits, "convlarge", row, method) is None


# The scripts

def test_a_run_that_is_stopped_and_resumed_equals_the_whole_with_its_dropout(emulated, tmp_path):
    for folder, steps in (("whole", 7), ("parts", 3), ("parts", 7)):
        code, output, _ = emulated(script, train_meta.main, *DIGITS, "--test-freq", 3, "--total-steps", steps,
                                   "--save-path", tmp_path / folder, "--resume")
        assert code == 0, output
    assert json.loads((tmp_path / "parts" / "results.json").read_text())["sessions"][-1]["device"] == "emu: emulated"
    assert differing(tmp_path / "whole", tmp_path / "parts") == []


@pytest.mark.parametrize("memory", [10 ** 9, 0], ids=["in memory", "from disk"])
def test_more_steps_without_a_log_line_or_an_evaluation_do_not_wait_more_often(emulated, tmp_path, memory):
    flags = [*DIGITS, *FEW, "--data-path", few_images(tmp_path / "data"), "--test-freq", 99, "--save-path", tmp_path]
    seen = []
    for steps in (8, 16):
        code, output, waits = emulated(script, train_meta.main, *flags, "--total-steps", steps, "--overwrite", memory=memory)
        assert code == 0, output
        assert ("read from disk" in output) == (memory == 0)
        seen.append(waits)
    assert sum(seen[0].values()) > 10
    assert seen[1] - seen[0] == seen[0] - seen[1] == Counter()


def test_a_finished_run_is_evaluated_and_plotted(emulated, tmp_path):
    code, output, _ = emulated(script, train_meta.main, *DIGITS, "--total-steps", 2, "--save-path", tmp_path / "run")
    assert code == 0, output
    best, predictions = tmp_path / "run" / "model_best.pth", tmp_path / "predictions.csv"
    code, output, _ = emulated(script, train_meta.main, "--evaluate", best, "--predictions", predictions)
    assert code == 0 and "convsmall on emu, float32" in output, output
    assert len(predictions.read_text().splitlines()) == 101
    code, output, _ = emulated(script, plot_features.main, "--checkpoint-path", best, "--save-path", tmp_path / "plot",
                               "--method", "pca", "--num-point", 40)
    assert code == 0, output
    assert [path.suffix for path in sorted((tmp_path / "plot").iterdir())]
