"""check_model: what it refuses, what it must not refuse, and that the model is afterwards what it was."""
from collections import deque

import numpy as np
import pytest
import torch
from oracle import modalities, random_case, relative_error
from torch import nn
from torch.nn.functional import dropout, linear, normalize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import metasemi.check
from metasemi import METHODS, check_model, meta_gradient
from models import build_model
from models.wideresnet import WideResNet


class Part(nn.Module):
    """The middle of a small network, made of a function of (self, x) and of what it holds."""

    def __init__(self, forward, train=None, **held):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.function, self.at_train = nn.Linear(8, 8), forward, train
        for name, value in held.items():
            setattr(self, name, value(self) if callable(value) and not isinstance(value, nn.Module) else value)

    def train(self, mode=True):
        super().train(mode)
        if self.at_train:
            self.at_train(self, mode)
        return self

    def forward(self, x):
        return self.function(self, x)


def network(middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), middle, nn.Tanh(), nn.Linear(8, 3))


def case():
    generator = torch.Generator().manual_seed(0)
    x_l, x_u = torch.randn(4, 6, generator=generator), torch.randn(5, 6, generator=generator)
    return x_l, torch.tensor([0, 1, 2, 0]), x_u


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d):
        return d * ctx.saved_tensors[0].cos()


def keeps(layer):
    weight = layer.weight
    return [lambda x: linear(x, weight)]


def adapter(self, x):
    return self.layer(x) if self.merged else self.layer(x) + x @ self.delta.T


def merge(self, mode):
    if self.merged is mode:
        self.layer.weight.data += (-1 if mode else 1) * self.delta.data
        self.merged = not mode


def centered(self, x):
    y = self.layer(x)
    if self.training:
        self.center = 0.9 * self.center + 0.1 * y.detach().mean(dim=0)
    return y - self.center


MISSES = "the meta-gradient misses 2.layer.weight, which the logits depend on other than by a registered name: reach each"
WRONG = {           # what is wrong -> (middle of the network, methods that must be refused, message)
    "a function that keeps a weight": (lambda: Part(lambda self, x: self.kept[0](x), kept=lambda self: keeps(self.layer)),
                                       METHODS, MISSES),
    "a plain list of layers": (lambda: Part(lambda self, x: self.layers[0](x), layers=[nn.Linear(8, 8)]), METHODS,
                               r"misses a weight of the shape \(8, 8\) that is no parameter of the model, a .*registered"),
    "a weight's data": (lambda: Part(lambda self, x: self.layer(x) + linear(x, self.kept[0]),
                                     kept=lambda self: [self.layer.weight.data]), METHODS,
                        "off on this model, and no other is right: .*or weights kept from one call to the next"),
    "a backward that leaves the graph": (lambda: Part(lambda self, x: Sine.apply(self.layer(x))), ["unrolled"],
                                         "'unrolled' is .*% off on this model, where 'finite-difference' is right: take"),
    "no formula for forward mode": (lambda: Part(lambda self, x: Sine.apply(self.layer(x))), ["jvp"],
                                    "'jvp' fails .NotImplementedError: You must implement .* where 'finite-difference' is"),
    "no_grad": (lambda: Part(lambda self, x: self.layer(x) * (1 + torch.no_grad()(self.layer)(x))), ["unrolled"],
                "'unrolled' is .*% off .* where 'jvp' and 'finite-diff.* are"),
    "detach": (lambda: Part(lambda self, x: self.layer(x) + self.layer(x).detach().square()), ["jvp", "unrolled"],
               "% off on this model, where 'finite-difference' is right"),
    "a straight-through estimator": (lambda: Part(lambda self, x: x + ((8 * x).round() / 8 - x).detach()),
                                     ["jvp", "unrolled"], "% off on this model, where 'finite-difference' is right"),
    "dropout without training=": (
        lambda: nn.Sequential(nn.Linear(8, 8), Part(lambda self, x: dropout(self.layer(x), 0.5))), METHODS,
        r"two passes in evaluation mode give different logits: the network draws random numbers, so let it ask self.training"),
    "random numbers of numpy": (lambda: Part(lambda self, x: self.layer(x) * np.random.rand()), METHODS,
                                "two passes in evaluation mode give different logits: the network changes its own state, or"),
    "an adapter that is merged": (
        lambda: Part(adapter, merge, merged=False, delta=lambda self: nn.Parameter(torch.randn(8, 8) / 7)), METHODS,
        r"train\(False\) of the model changes 2.layer.weight, which train\(True\) cannot give back"),
    "a weight cached for evaluation": (
        lambda: Part(lambda self, x: linear(x, normalize(self.layer.weight) if self.kept is None else self.kept),
                     lambda self, mode: setattr(self, "kept", None if mode else normalize(self.layer.weight).detach()),
                     kept=None),
        METHODS, r"in evaluation mode the logits depend on 2.layer.weight only by copies that train\(False\) made"),
    "a layer made late": (lambda: Part(lambda self, x: self._modules.setdefault("made", nn.Linear(8, 8))(x)), METHODS,
                          "the first forward makes the parameter 2.made.*: make it in"),
    "a buffer that no checkpoint holds": (
        lambda: Part(centered, kept=lambda self: self.register_buffer("center", torch.zeros(8), persistent=False)), METHODS,
        r"training changes state that the logits depend on and state_dict\(\) does not hold: make it a persistent buffer"),
    "steps too small to see": (lambda: Part(lambda self, x: self.layer(x) + 1e-2 * torch.sin(1e13 * self.layer(x))), METHODS,
                               "the predictions do not change smoothly as the weights move .*: the network rounds, jumps, or"),
    "logits that are not finite": (lambda: Part(lambda self, x: self.layer(x) * torch.nan), METHODS, "the logits are not"),
}


@pytest.mark.parametrize(("wrong", "method"), [(wrong, method) for wrong in WRONG for method in WRONG[wrong][1]])
def test_a_network_for_which_the_method_is_wrong_is_refused_with_cause_and_remedy_and_left_as_it_was(wrong, method):
    middle, _, message = WRONG[wrong]
    model = network(middle())
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        check_model(model, *case(), method=method)
    assert_same(everything(model), before)


RIGHT = {
    "batch norm": lambda: nn.BatchNorm1d(8), "without statistics": lambda: nn.BatchNorm1d(8, track_running_stats=False),
    "group norm": lambda: nn.GroupNorm(2, 8), "dropout": nn.Dropout, "kinks": nn.ReLU, "steps": lambda: Part(
        lambda self, x: self.layer(x) + (8 * x).round()),
    "spectral norm": lambda: spectral_norm(nn.Linear(8, 8)), "weight norm": lambda: weight_norm(nn.Linear(8, 8)),
    "an LSTM": lambda: Part(lambda self, x: self.lstm(x[:, None])[0][:, 0], lstm=nn.LSTM(8, 8, batch_first=True)),
    "attention": lambda: Part(lambda self, x: self.attend(x[:, None].expand(-1, 3, -1) * self.layer.weight[:3]).mean(dim=1),
                              attend=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
    "a registered layer in a list": lambda: Part(lambda self, x: self.layers[0](x), layers=lambda self: [self.layer]),
    "a tied weight": lambda: Part(lambda self, x: linear(self.layer(x), self.other), other=lambda self: self.layer.weight),
    "a frozen part": lambda: nn.Linear(8, 8).requires_grad_(False), "an unused part": lambda: Part(lambda self, x: x),
    "float32 in the middle": lambda: Part(lambda self, x: self.layer(x.float().softmax(dim=1).to(x.dtype))),
    "a kept activation": lambda: Part(lambda self, x: setattr(self, "last", self.layer(x)) or self.last),
    "a frozen list of layers": lambda: Part(lambda self, x: self.layers[0](x), layers=[nn.Linear(8, 8).requires_grad_(False)]),
    "a part for training alone": lambda: Part(lambda self, x: self.layer(x) if self.training else x),
    "a backward that leaves the graph": WRONG["a backward that leaves the graph"][0],
    "a zero layer": lambda: Part(lambda self, x: self.layer(x), zero=lambda self: nn.init.zeros_(self.layer.weight)),
}
UNABLE = {"weight norm": ["jvp"], "a backward that leaves the graph": ["jvp", "unrolled"]}


@pytest.mark.parametrize(("right", "method"), [(right, method) for right in RIGHT for method in METHODS
                                               if method not in UNABLE.get(right, [])])
def test_a_network_for_which_the_method_is_right_is_not_refused_and_left_as_it_was(right, method):
    model = network(RIGHT[right]())
    before = everything(model)
    error = check_model(model, *case(), method=method)
    assert error < (0.1 if method == "finite-difference" else 1e-4 if right == "float32 in the middle" else 1e-8)
    assert_same(everything(model), before)


@pytest.mark.parametrize("consistency", ["mse", "kl"])
@pytest.mark.parametrize("network", [lambda: build_model("convsmall", 10), lambda: WideResNet(10, depth=10, widen=1)])
def test_a_bundled_network_with_kinks_is_right_and_a_wrong_factor_is_not(network, consistency, monkeypatch):
    torch.manual_seed(1)
    model, (x_l, y_l, x_u) = network(), random_case(size=16, labeled=2, unlabeled=3, num_classes=10)
    batch = x_l.float(), y_l, x_u.float()
    error = check_model(model, *batch, consistency=consistency)
    assert error < 1e-3
    monkeypatch.setattr(metasemi.check, "meta_gradient", lambda *args: (None, 1.02 * meta_gradient(*args)[1]))
    with pytest.raises(ValueError, match="the method 'jvp' is 2.0% off on this model, and no other is right"):
        check_model(model, *batch, consistency=consistency)


def test_the_error_of_the_finite_difference_is_that_of_the_epsilon_given():
    model, (x_l, y_l, x_u) = network(nn.Linear(8, 8)).double(), case()
    batch = x_l.double(), y_l, x_u.double()
    exact = meta_gradient(model, *batch)[1]
    for epsilon in (1.0, 1e-2):
        found = meta_gradient(model, *batch, method="finite-difference", epsilon=epsilon)[1]
        error = check_model(model, *batch, method="finite-difference", epsilon=epsilon)
        assert error == pytest.approx(relative_error(found, exact), rel=1e-3) and error > 1e-6
    with pytest.raises(ValueError, match="epsilon is 0.0: expected a length between"):
        check_model(model, *batch, epsilon=0.0)


def test_a_network_that_does_not_run_in_float64_is_checked_in_its_own_type():
    def named(inner):
        return Part(lambda self, x: self.inner(x.float()), inner=network(inner))

    assert 1e-9 < check_model(named(nn.ReLU()), *case()) < 1e-2
    for wrong, message in (("a function that keeps a weight", "misses inner.2.layer.weight"), ("detach", "'jvp' is .* off")):
        model = named(WRONG[wrong][0]())
        before = everything(model)
        with pytest.raises(ValueError, match=message):
            check_model(model, *case())
        assert_same(everything(model), before)


@pytest.mark.parametrize("modality", modalities())
def test_points_series_and_token_ids_are_right_whatever_the_type_of_the_weights(modality):
    model, x_l, y_l, x_u = modalities()[modality]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = [x.to(dtype) if x.is_floating_point() else x for x in (x_l, x_u)]
        assert check_model(model.to(dtype), x[0], y_l, x[1]) < 1e-8


def test_a_labeled_gradient_of_zero_has_no_error():
    model, (x_l, y_l, x_u) = nn.Sequential(nn.Linear(6, 3, bias=False)), case()
    assert check_model(model, 0 * x_l, y_l, x_u) == 0.0


def test_a_compiled_network_is_right_and_the_fault_of_the_networks_own_is_raised_as_it_is():
    assert check_model(torch.compile(network(nn.ReLU()), backend="aot_eager"), *case()) < 1e-8
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        check_model(network(nn.Linear(7, 8)), *case())
    with pytest.raises(ValueError, match="the logits depend on no parameter of the model that requires a gradient: reach its"):
        check_model(nn.Sequential(network(nn.ReLU()), Part(lambda self, x: x.detach())), *case())
    with pytest.raises(ValueError, match="no method is named 'newton'"):
        check_model(network(nn.ReLU()), *case(), method="newton")


def test_modes_attributes_gradients_and_random_state_are_afterwards_what_they_were():
    torch.manual_seed(2)
    model = nn.Sequential(network(nn.BatchNorm1d(8)), nn.Dropout(), Part(
        lambda self, y: self.seen.append(y) or self.past.update(last=y) or self.recent.append(y) or y, seen=[1, torch.ones(2)],
        past={"first": torch.zeros(2)}, recent=deque([0], maxlen=2)))
    model[0][0].weight.grad = torch.randn(8, 6)
    model[0][2].eval()
    before = everything(model)
    check_model(model, *case())
    assert_same(everything(model), before)
    assert model[2].seen[1:] == [before[3][0]] and list(model[2].recent) == [0] and [*model[2].past] == ["first"]


@pytest.mark.parametrize("failing", [False, True])
def test_a_weight_that_only_a_function_holds_is_put_back_also_when_the_network_fails(failing):
    weight = torch.randn(8, 8, requires_grad=True)
    before = weight.detach().clone()

    def function(x):
        if failing and not torch.equal(weight, before):
            raise RuntimeError("moved")
        return linear(x, weight)

    error, message = (RuntimeError, "moved") if failing else (ValueError, r"misses a weight of the shape \(8, 8\)")
    with pytest.raises(error, match=message):
        check_model(network(Part(lambda self, x: function(x))), *case())
    assert torch.equal(weight, before)


def everything(model):
    """What a model is, as lists of tensors and of plain values."""
    seen = model[2].seen[1:] if hasattr(model, "__getitem__") and hasattr(model[2], "seen") else []
    tensors = [*model.parameters(), *model.buffers()]
    return ([t.detach().clone() for t in tensors], [w.grad.clone() for w in model.parameters() if w.grad is not None],
            [(id(t), t.dtype, t.stride(), t.data_ptr()) for t in tensors], seen,
            [(module.training, list(vars(module)), list(module._forward_hooks), list(module._modules))
             for module in model.modules()],
            torch.get_rng_state())


def assert_same(after, before):
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(after[i], before[i], strict=True))
    assert after[2] == before[2] and after[4] == before[4] and torch.equal(after[5], before[5])
