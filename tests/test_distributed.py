"""Several processes on gloo against one process on the same global batch, and what happens when one of them ends."""
import os
import random
import re
import signal
import time
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SHORT
from helpers import (
    FEW,
    SERVER,
    Processes,
    become,
    differing,
    few_images,
    finish,
    make_store,
    records,
    run_processes,
    start,
    tensors,
    wait_for,
)
from injections import stand
from oracle import close
from torch import nn

from metasemi import METHODS, meta_gradient, training_step
from metasemi.step import evaluation_mode
from models.synchronized import synchronize_batch_norm
from utils import run_folder
from utils.distributed import World

SEED, BATCH, STEPS = 3, 8, 20
NETWORK = """import torch
from torch import nn


class Net(nn.Module):       # no bias before a batch normalization: its gradient would be rounding alone
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.Tanh(),
                                  nn.Conv2d(6, 8, 3, stride=2, bias=False))
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.norm(self.body(x).mean(dim=(2, 3))))
"""


@pytest.fixture
def store():
    return make_store()


def run(size, folder, *flags, patch=None):
    """A run from its start to its end, with a store of its own: exit codes, and what all wrote to standard error."""
    return run_processes(folder, [[*SHORT, *flags]] * size, patch)


# The mathematics, in float64

class Frozen(nn.BatchNorm2d):
    """Batch normalization that stays in evaluation mode."""

    def train(self, mode=True):
        return super().train(False)


def make_network(norm):
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.LeakyReLU(0.1), nn.Conv2d(6, 6, 3), norm(6), nn.Tanh(),
                          nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)).double()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2), nn.init.uniform_(module.running_var, 0.5, 2)
            module.training = False
    return model


def steps(norm, method, rows=slice(None), average=None, synchronize=None):
    """name -> tensor after STEPS steps on some rows of every batch; the meta-gradient and the labels of all steps too."""
    model = make_network(norm)
    if synchronize:
        synchronize_batch_norm(model, average, synchronize)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    found = {"gradient": [], "y_hat": [], "loss": []}
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(STEPS):
        x_l, x_u = torch.randn(2, BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
        y_l, lam = torch.randint(0, 5, (BATCH,), generator=generator), torch.rand(BATCH, generator=generator)
        batch = x_l[rows], y_l[rows], x_u[rows]
        found["gradient"].append(meta_gradient(model, *batch, method=method, average=average)[1])
        result = training_step(model, optimizer, *batch, alpha=0.1, beta=3.0, lam=lam[rows].double(), method=method,
                               average=average)
        found["y_hat"].append(result.y_hat)
        found["loss"].append(result.loss)
    return model.state_dict() | {name: torch.stack(values) for name, values in found.items()}


def several_steps(place, cases, results):
    become(*place)
    torch.set_num_threads(1)
    world = World()
    world.join(torch.device("cpu"))
    for norm, method, synchronized in cases:
        found = steps(norm, method, world.rows(BATCH), world.all_reduce_mean, world.size * synchronized)
        results.put((norm.__name__, method, place[0], {name: value.numpy() for name, value in found.items()}))
    world.leave()


@pytest.fixture(scope="module")
def one_process():
    return {case: steps(*case[:2]) for case in CASES}


CASES = [*((Frozen, method, False) for method in METHODS), (nn.BatchNorm2d, "jvp", True)]


@pytest.mark.parametrize("size", [2, 4])
def test_twenty_steps_of_several_processes_equal_those_of_one_in_float64(store, one_process, size):
    results = SERVER.Queue()
    processes = [SERVER.Process(target=several_steps, args=((rank, size, store.port), CASES, results)) for rank in range(size)]
    for process in processes:
        process.start()
    found = {}
    for _ in range(size * len(CASES)):
        norm, method, rank, values = results.get(timeout=600)
        found[norm, method, rank] = {name: torch.from_numpy(value) for name, value in values.items()}
    assert [finish(process) for process in processes] == [0] * size
    for (norm, method, _), expected in one_process.items():
        for rank in range(size):
            several = found[norm.__name__, method, rank]
            rows = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
            for name, value in expected.items():
                value = value[:, rows] if name in ("gradient", "y_hat") else value
                assert close(several[name].to(value.dtype), value, 1_000_000), (norm, method, rank, name)
            assert all(torch.equal(several[name], found[norm.__name__, method, 0][name])
                       for name in several if name not in ("gradient", "y_hat"))
        assert expected["gradient"].abs().max() > 1e-3


def test_synchronized_batch_norm_of_one_process_is_batch_norm():
    for layer, shape in ((nn.BatchNorm2d(3, momentum=None), (5, 3, 4, 4)), (nn.BatchNorm1d(3, affine=False), (6, 3)),
                         (nn.BatchNorm2d(3, track_running_stats=False), (5, 3, 4, 4))):
        own = type(layer)(3, affine=layer.affine, momentum=layer.momentum, track_running_stats=layer.track_running_stats)
        synchronize_batch_norm(own, list, 1)
        for _ in range(3):
            x = (3 + torch.randn(shape)).requires_grad_()
            y = x.detach().clone().requires_grad_()
            weight = torch.randn(shape)
            (layer(x) * weight).sum().backward(), (own(y) * weight).sum().backward()
            assert close(own(y), layer(x)) and close(y.grad, x.grad)
        for mine, theirs in zip(own.state_dict().values(), layer.state_dict().values()):
            assert close(mine, theirs)
        with evaluation_mode(layer), evaluation_mode(own):
            assert close(own(x), layer(x))


def test_synchronizing_keeps_the_parameters_and_what_a_subclass_overrides_and_a_copy_is_apart():
    model = nn.Sequential(nn.BatchNorm2d(3), Frozen(3))
    parameters = list(model.parameters())
    synchronize_batch_norm(model, list, 1)
    assert all(mine is before for mine, before in zip(model.parameters(), parameters, strict=True))
    other = deepcopy(model).train()
    assert [module.training for module in other] == [True, False]
    other(torch.randn(4, 3, 2, 2))
    assert other[0].num_batches_tracked == 1 and model[0].num_batches_tracked == 0


# Whole runs

@pytest.fixture
def network(tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    return ["-a", f"{tmp_path / 'net.py'}:Net", "--mix-up", "--sync-bn", "--num-val", "30", "--total-steps", "20",
            "--test-freq", "8", "--num-label", "100"]


IMAGES = {"train": 16, "validation": 30, "test": 100}          # behind each accuracy of a run of `network`


def test_a_run_of_two_processes_equals_a_run_of_one_and_leaves_the_same_files(train, tmp_path, network):
    assert train("one", *network) == 0
    assert run(2, tmp_path, *network, "--save-path", tmp_path / "two") == ([0, 0], "")
    one, two = (tensors(torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)) for name in ("one", "two"))
    for key, value in one.items():
        if "rng" not in key:
            assert close(two[key], value, 1000), key
    assert two.keys() - one.keys() == {"/rng/1/cpu"}
    ours, theirs = records(tmp_path / "one"), records(tmp_path / "two")
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():            # in an accuracy one image may be as close as rounding
            tolerance = {"abs": 1.01 / IMAGES[name.split("/")[0]]} if "acc" in name else {"rel": 1e-4}
            assert other[name] == pytest.approx(value, **tolerance), name
    assert {p.name for p in (tmp_path / "one").iterdir() if "tfevents" not in p.name} == {
        p.name for p in (tmp_path / "two").iterdir() if "tfevents" not in p.name}
    assert len(list((tmp_path / "two").glob("*tfevents*"))) == 1
    said = Path(tmp_path / "rank1.out").read_text().splitlines()
    assert [line for line in said if not line.startswith("[Gloo]")] == []      # torch 2.8 tells of a connection
    # and goes on with one process
    assert train("two", *network, "--total-steps", "22", "--resume") == 0
    assert "2 processes and is cpu" in (tmp_path / "two" / "log.txt").read_text()


def test_a_stopped_run_of_two_processes_continues_bit_for_bit_dropout_included(tmp_path, store):
    assert run(2, tmp_path, "--save-path", tmp_path / "whole") == ([0, 0], "")
    parts = ["--save-path", tmp_path / "parts", "--resume"]
    assert run(2, tmp_path, *parts, "--total-steps", "4") == ([0, 0], "")
    assert run(2, tmp_path, *parts) == ([0, 0], "")
    assert differing(tmp_path / "whole", tmp_path / "parts") == []
    state = torch.load(tmp_path / "parts" / "checkpoint.pth", weights_only=True)
    assert not torch.equal(*(states["cpu"] for states in state["rng"]))


def slow_steps():
    """A step takes 50 ms more, so that a signal falls into the training."""
    import metasemi

    step = metasemi.training_step

    def slow(*args, **kwargs):
        time.sleep(0.05)
        return step(*args, **kwargs)
    metasemi.training_step = slow


LONG = ["--total-steps", "2000", "--test-freq", "4"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_after_the_same_step_with_everything_saved(store, tmp_path, number):
    several = Processes(store, tmp_path, [[*SHORT, *LONG, "--save-path", tmp_path / "a"]] * 2, slow_steps)
    wait_for(tmp_path / "rank0.out", "  loss ", several.processes[0])
    os.kill(several.processes[1].pid, number)
    assert several.end() == ([128 + number] * 2, ["", ""])
    log = (tmp_path / "a" / "log.txt").read_text()
    step = int(re.search(r"stopped by a signal at step (\d+)/", log)[1])
    assert torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)["step"] == step


@pytest.mark.parametrize("victim", [0, 2])
def test_when_a_process_is_killed_the_others_end_with_one_line_and_the_run_resumes(store, tmp_path, victim):
    flags = ["--save-path", tmp_path / "a", "--batch-size", "9"]
    several = Processes(store, tmp_path, [[*SHORT, *LONG, *flags]] * 3, slow_steps)
    wait_for(tmp_path / "rank0.out", "step 8/2000  test error", several.processes[0])        # after a save
    time.sleep(random.uniform(0, 0.3))
    several.processes[victim].kill()
    codes, errors = several.end()
    assert codes == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]
    assert [error.count("\n") for error in errors] == [rank != victim for rank in range(3)]
    assert "another process of this run is gone" in "".join(errors)
    saved = torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)["step"]
    assert saved >= 4 and run(3, tmp_path, *flags, "--resume", "--total-steps", str(saved + 1)) == ([0] * 3, "")
    assert f"resumed at step {saved}" in (tmp_path / "a" / "log.txt").read_text()


def disturbed():
    """From step 5 on one weight of rank 1 is another, by one unit in the last place."""
    import metasemi

    step, calls = metasemi.training_step, []

    def disturb(model, *args, **kwargs):
        result = step(model, *args, **kwargs)
        calls.append(None)
        if len(calls) == 5 and os.environ["RANK"] == "1":
            w = model.classifier.bias.data
            w[3] = torch.nextafter(w[3], w[3] + 1)
        return result
    metasemi.training_step = disturb


def poisoned():
    """The images of rank 1 are not finite at step 5."""
    from datasets import batches

    draw = batches.Batches.draw

    def poison(self, part, step):
        x, y = draw(self, part, step)
        return (x * float("nan") if step == 5 and os.environ["RANK"] == "1" else x), y
    batches.Batches.draw = poison


def vanishing(part, last):
    """Images are read from disk, and a class of rank 1's own loses them all during step `last`."""
    import metasemi
    from utils import setup

    step, calls = metasemi.training_step, []
    setup.memory_for_images = lambda device: 0

    def vanish(*args, **kwargs):
        result = step(*args, **kwargs)
        calls.append(None)
        if len(calls) == last and os.environ["RANK"] == "1":
            Path(part, "ant").rename(Path(part, "away"))
        return result
    metasemi.training_step = vanish


def full_disk():
    """Rank 0 cannot make the run folder."""
    def refuse(*args, **kwargs):
        raise OSError("No space left on device")
    run_folder.files.lock = refuse


@pytest.mark.parametrize(("flags", "patch", "code", "message"), [
    ([], disturbed, 1,
     "the 2 processes are not equal any more at step 6: 1 of 56 tensors differ, classifier.bias the first of them"),
    ([], poisoned, 1, "not finite at step 5, whose update was left out; the last finite loss was"),
    ([], full_disk, 1, "No space left on device"),
    (["--batch-size", "7"], None, 2, "--batch-size: 7 for 2 processes: use a multiple of 2"),
    (["--resume", "none.pth"], None, 2, "none.pth: no such checkpoint"),
    (["--evaluate", "x.pth"], None, 2, "--evaluate: it takes one process")])
def test_a_fault_of_one_process_or_a_wrong_flag_ends_all_with_a_line_each(tmp_path, flags, patch, code, message):
    codes, errors = run(2, tmp_path, "--save-path", tmp_path / "a", *flags, patch=patch)
    assert 0 not in codes and code in codes and errors.count("\n") <= 2 and message in errors, errors
    assert code == 1 or not (tmp_path / "a").exists()


@pytest.mark.parametrize(("part", "step", "saved"), [("train", 1, 1), ("test", 3, 2)])
def test_images_that_vanish_for_one_process_end_all_and_the_last_checkpoint_is_intact(tmp_path, part, step, saved):
    places = [few_images(tmp_path / name) for name in ("here", "there")]
    flags = [*SHORT, *FEW, "--data-path", ".", "--total-steps", "4", "--test-freq", "2", "--save-path", tmp_path / "a"]
    codes, error = run_processes(tmp_path, [flags] * 2, partial(stand, *places), partial(vanishing, part, step))
    assert 0 not in codes and 1 in codes and error.count("\n") <= 2, error
    assert re.search(rf"train_meta.py: {part}/ant/\d.bmp cannot .*No such file.*; .*checkpoint.pth of step \d is intact", error)
    assert torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)["step"] == saved
    (places[1] / part / "away").rename(places[1] / part / "ant")
    assert run_processes(tmp_path, [[*flags, "--resume"]] * 2, partial(stand, *places)) == ([0, 0], "")


def under_torchrun():
    """train_meta.py as torchrun starts it twice, but forked where torch is loaded; the first is killed at step 5, once."""
    from torch.distributed import run

    import metasemi
    import train_meta

    step, main, launch, calls = metasemi.training_step, train_meta.main, run.elastic_launch, []

    def mortal(*args, **options):
        calls.append(None)
        if len(calls) == 5 and os.environ["RANK"] == os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **options)

    metasemi.training_step = mortal
    run.elastic_launch = lambda config, entrypoint: launch(
        replace(config, start_method="fork"), lambda unbuffered, script, *flags: main(flags))
    train_meta.main = lambda flags: run.main(["--standalone", "--nproc-per-node=2", "--max-restarts=1", "train_meta", *flags])


def test_torchrun_restarts_a_run_whose_process_was_killed(tmp_path):
    flags = [*SHORT, "--no-meta", "--save-path", tmp_path / "a", "--resume", "--test-freq", "1", "--total-steps", "8"]
    process = start(flags, under_torchrun, output=tmp_path / "torchrun")
    assert finish(process) == 0, (tmp_path / "torchrun.err").read_text()
    assert (tmp_path / "torchrun.err").read_text().count("train_meta.py: another process") <= 1
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "resumed at step 4 " in log and "finished 8 steps" in log
    assert [line["step"] for line in records(tmp_path / "a") if "test/accuracy" in line] == list(range(1, 9))


# Parts

@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": ""}, {"WORLD_SIZE": "abc"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-1"}, {"WORLD_SIZE": "9" * 400},
    {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "port"}])
def test_an_environment_that_is_not_of_torchrun_is_one_line(train, tmp_path, capsys, monkeypatch, environment):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train("a") == 2 and list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == (f"train_meta.py: WORLD_SIZE={environment['WORLD_SIZE'][:20]!r} in the environment is "
                                       "not as torchrun sets it, with RANK, MASTER_ADDR and MASTER_PORT: start with torchrun, "
                                       "or unset it\n")
