"""utils/device.py on devices that this machine lacks: what it asks of torch, and what it says."""
import os
from types import SimpleNamespace

import pytest
import torch

from utils.device import (
    choose_device,
    get_random_state,
    memory_for_images,
    set_precision,
    set_random_state,
    why_missing,
)
from utils.errors import UsageError, one_line_errors

CPU = torch.device("cpu")


@pytest.fixture
def accelerator(monkeypatch):
    """accelerator(kind, **functions): torch then says that it has two devices of that kind, with those functions alone."""
    def pretend(kind, **functions):
        module = SimpleNamespace(**functions)
        for name, value in {"current_accelerator": torch.device(kind), "is_available": True, "device_count": 2}.items():
            monkeypatch.setattr(torch.accelerator, name, lambda value=value: value)
        monkeypatch.setattr(torch, "get_device_module", lambda device=None: module)
        return torch.device(kind, 1)
    return pretend


def test_auto_takes_the_accelerator_that_torch_finds_and_every_process_one_of_its_own(accelerator):
    assert choose_device("cpu") == CPU
    current = []
    accelerator("xpu", set_device=current.append)
    assert [choose_device(name, rank) for name, rank in (("auto", 0), ("xpu", 1), ("cpu", 5))] == [
        torch.device("xpu", 0), torch.device("xpu", 1), CPU]
    assert current == [torch.device("xpu", 0), torch.device("xpu", 1)]
    with pytest.raises(UsageError, match="has 2 of type xpu and more processes than that: give torchrun --nproc-per-node=2"):
        choose_device("auto", 2)
    with pytest.raises(UsageError, match=r"--device: mps: no MPS device is visible to torch [\d.]+.*; use --device xpu"):
        choose_device("mps")


@pytest.mark.parametrize("error", [
    RuntimeError("The NVIDIA driver is too old (found version 12040). Please update your GPU driver by downloading ... "),
    RuntimeError("No CUDA GPUs are available"), AssertionError("Torch not compiled with CUDA enabled")])
def test_the_refusal_of_cuda_says_why_torch_finds_none_and_what_to_do(monkeypatch, error):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(error))
    assert choose_device("auto") == CPU
    said = str(error).partition(". ")[0]
    with pytest.raises(UsageError) as caught:
        choose_device("cuda")
    assert str(caught.value) == (f"argument --device: cuda: no CUDA device is visible to torch {torch.__version__} ({said}; "
                                 "README.md says which build needs which driver); use --device cpu")
    assert why_missing("xpu") == f"no XPU device is visible to torch {torch.__version__}"


def test_every_switch_of_torch_agrees_after_each_precision_whatever_was_set_before():
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    parts = (cuda, cudnn.conv, cudnn.rnn) if hasattr(cuda, "fp32_precision") else ()         # not before torch 2.9
    before = cudnn.benchmark
    try:
        for precision, allowed in (("tf32", True), ("float32", False), ("tf32", True), ("bfloat16", False)):
            for part, earlier in zip(parts, ("tf32", "ieee", "tf32")):
                part.fp32_precision = earlier
            dtype = set_precision(precision, torch.device("cuda"))
            assert dtype == (torch.bfloat16 if precision == "bfloat16" else None)
            assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
            assert (cuda.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
            assert all((part.fp32_precision == "tf32") is allowed for part in parts)
    finally:
        set_precision("float32", CPU)
        cudnn.benchmark = before
    with pytest.raises(UsageError, match="tf32 exists on CUDA only"):
        set_precision("tf32", CPU)


def test_memory_for_images_is_a_third_of_what_is_free_shared_by_processes_and_less_where_the_device_has_less(
        accelerator, monkeypatch):
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < memory_for_images(CPU) <= physical // 12
    for nothing in ("", "0", "x"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", nothing)
        assert 0 < memory_for_images(CPU) <= physical // 3
    assert memory_for_images(accelerator("xpu", mem_get_info=lambda device: (3000 + device.index, physical))) == 1000
    assert memory_for_images(accelerator("mps")) > 3000             # has no such function


def test_random_states_go_by_the_type_of_their_device_and_one_of_another_is_left_out_with_a_line(accelerator):
    own, before = [torch.arange(4, dtype=torch.uint8)], get_random_state(CPU)
    device = accelerator("xpu", get_rng_state=lambda device: own[0], set_rng_state=lambda state, device: own.append(state))
    states = get_random_state(device)
    assert states.keys() == {"cpu", "xpu"}
    drawn = torch.rand(3)
    assert set_random_state(states, device) == [] and own[1] is own[0] and torch.equal(torch.rand(3), drawn)
    for kinds, here in ((("cpu", "xpu"), CPU), (("cpu",), device), (("cpu", "cuda"), device)):
        line, = set_random_state(dict.fromkeys(kinds, before["cpu"]), here)
        assert f"random numbers of {kinds[-1]} do not go on on {here.type}: " in line
    assert len(own) == 2 and torch.equal(torch.get_rng_state(), before["cpu"])


def test_an_operation_that_a_device_lacks_is_named_with_the_flag_that_does_without_its_derivative(capsys):
    def line(error):
        with pytest.raises(SystemExit, match="1"), one_line_errors("x.py"):
            raise error
        return capsys.readouterr().err

    x = torch.ones(2, 2, requires_grad=True)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError) as caught:
        torch.autograd.forward_ad.make_dual(x, x.detach()).geqrf()
    assert line(caught.value).startswith(
        "x.py: the operation geqrf, or its forward-mode derivative, does not exist on this device: take --meta-gradient finite")
    for said in ("The operator 'aten::triu.out' is not currently implemented for the MPS device. If you want",
                 "Could not run 'aten::triu.out' with arguments from the 'MPS' backend. This could"):
        assert "the operation triu.out, or its" in line(NotImplementedError(said))
    with pytest.raises(RuntimeError, match="multiplied"):
        line(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
