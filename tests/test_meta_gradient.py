"""The meta-gradient against double backward through the virtual step, in float64."""
from contextlib import suppress

import pytest
import torch
from oracle import Checkpointed, close, exact_gradient, modalities, random_case, relative_error, smooth_network
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import VisionTransformer

from metasemi import METHODS, meta_gradient
from metasemi.gradient import evaluation_mode
from metasemi.losses import CONSISTENCY, Consistency
from models import NETWORKS, build_model

EPSILON = 1e-2          # of the paper


@pytest.fixture(scope="module")
def networks():
    """Every network in float64 with running statistics that have seen data, in evaluation mode."""
    built = {}
    for name in NETWORKS:
        torch.manual_seed(1)
        model = build_model(name, 10).double()
        with torch.no_grad():
            model(torch.randn(8, 3, 16, 16, dtype=torch.float64))
        built[name] = model.eval()
    return built


IMAGES = random_case(size=16, labeled=1, unlabeled=2, num_classes=10)


@pytest.mark.parametrize("consistency", ["mse", "kl"])
@pytest.mark.parametrize("name", NETWORKS)
def test_jvp_and_unrolled_equal_double_backward_on_every_network(networks, name, consistency):
    y_tilde, exact = exact_gradient(networks[name], *IMAGES, consistency=consistency)
    for method in ("jvp", "unrolled"):
        y, gradient = meta_gradient(networks[name], *IMAGES, method=method, consistency=consistency)
        assert close(y, y_tilde, 10_000)
        assert relative_error(gradient, exact) < 1e-9


@pytest.mark.parametrize("consistency", ["mse", "kl"])
@pytest.mark.parametrize(("name", "epsilon"), [("convlarge", EPSILON), ("resnet18", 1e-4), ("resnet50", 1e-4)])
def test_finite_difference_is_close_on_convlarge_at_the_epsilon_of_the_paper_and_on_resnets_at_less(
        networks, name, epsilon, consistency):
    _, exact = exact_gradient(networks[name], *IMAGES, consistency=consistency)
    _, gradient = meta_gradient(networks[name], *IMAGES, method="finite-difference", epsilon=epsilon, consistency=consistency)
    assert relative_error(gradient, exact) < 2e-2


@pytest.mark.parametrize("consistency", ["mse", "kl"])
def test_error_of_the_finite_difference_falls_fourfold_when_epsilon_halves(consistency):
    model, case = smooth_network().eval(), random_case()
    _, exact = exact_gradient(model, *case, consistency=consistency)
    coarse, fine = (relative_error(meta_gradient(model, *case, method="finite-difference", epsilon=epsilon,
                                                 consistency=consistency)[1], exact) for epsilon in (2e-2, 1e-2))
    assert fine < 1e-4
    assert coarse / fine == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(("dtype", "least", "most"), [(None, 0, 1e-5), (torch.bfloat16, 1e-6, 2e-2)])
def test_jvp_in_float32_and_bfloat16_is_close_to_the_float64_oracle_on_convlarge(networks, dtype, least, most):
    _, exact = exact_gradient(networks["convlarge"], *IMAGES)
    model = build_model("convlarge", 10).eval()
    model.load_state_dict(networks["convlarge"].state_dict())
    x_l, y_l, x_u = IMAGES
    y_tilde, gradient = meta_gradient(model, x_l.float(), y_l, x_u.float(), dtype=dtype)
    assert {tensor.dtype for tensor in (y_tilde, gradient, *model.parameters())} == {torch.float32}
    assert least < relative_error(gradient, exact) < most


@pytest.mark.parametrize("method", METHODS)
def test_parameters_buffers_gradients_flags_and_random_state_are_unchanged_bit_for_bit(method):
    torch.manual_seed(3)
    model = build_model("convsmall", 10)
    model.body[0][0].conv.weight.grad = torch.randn_like(model.body[0][0].conv.weight)
    model.body[3].eval()
    model.body[1][0].bn.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradient = model.body[0][0].conv.weight.grad.clone()
    flags = [module.training for module in model.modules()]
    x_l, y_l, x_u = random_case(size=16, num_classes=10)
    random_state = torch.get_rng_state()

    y_tilde, _ = meta_gradient(model, x_l.float(), y_l, x_u.float(), method=method)

    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model.body[0][0].conv.weight.grad, gradient)
    assert [name for name, w in model.named_parameters() if w.grad is not None] == ["body.0.0.conv.weight"]
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    assert close(y_tilde, model.eval()(x_u.float()).softmax(dim=1), 1000)


@pytest.mark.parametrize("consistency", ["mse", "kl"])
@pytest.mark.parametrize("method", METHODS)
def test_zero_labeled_gradient_gives_zero_meta_gradient(method, consistency):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False)).double()
    x_l, x_u = torch.zeros(4, 3, 2, 2, dtype=torch.float64), torch.randn(5, 3, 2, 2, dtype=torch.float64)
    _, gradient = meta_gradient(model, x_l, torch.tensor([0, 1, 2, 0]), x_u, method=method, consistency=consistency)
    assert torch.equal(gradient, torch.zeros(5, 3, dtype=torch.float64))


def test_works_where_the_caller_has_switched_gradients_off():
    model, case = smooth_network().eval(), random_case()
    expected = meta_gradient(model, *case)[1]
    with torch.no_grad():
        assert torch.equal(meta_gradient(model, *case)[1], expected)


def shared(pattern):
    """A network in which a module or a tensor has two names."""
    torch.manual_seed(4)
    conv, bn, other, prelu = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1), nn.PReLU(6)
    encoder = nn.Sequential(conv, nn.Tanh())
    if pattern == "tied weight":
        other.weight = conv.weight
    parts = {"module under two names": [conv, bn, nn.Tanh(), conv], "activation used twice": [conv, prelu, bn, prelu],
             "alias of a part": [nn.Sequential(encoder, bn), encoder], "tied weight": [conv, bn, nn.Tanh(), other],
             "shared batch norm": [nn.Sequential(conv, bn), nn.Tanh(), nn.Sequential(other, bn)]}
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), *parts[pattern], nn.Tanh(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(6, 5)).double()


@pytest.mark.parametrize("pattern", ["module under two names", "activation used twice", "alias of a part", "tied weight",
                                     "shared batch norm"])
def test_shared_modules_and_tensors_are_exact_and_stay_the_parameters_that_they_were(pattern):
    model, case = shared(pattern), random_case()
    with torch.no_grad():
        model(case[2])
    holders = [(module._parameters, name, w) for module in model.modules() for name, w in module._parameters.items()]
    _, exact = exact_gradient(model.eval(), *case)
    for method, tolerance in (("jvp", 1e-9), ("unrolled", 1e-9), ("finite-difference", 2e-2)):
        for _ in range(2):
            assert relative_error(meta_gradient(model, *case, method=method)[1], exact) < tolerance
    _, gradient = meta_gradient(model.float(), case[0].float(), case[1], case[2].float(), dtype=torch.bfloat16)
    assert relative_error(gradient, exact) < 0.1
    assert all(parameters[name] is w for parameters, name, w in holders)


def transformer():
    torch.manual_seed(5)
    vit = VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    nn.init.normal_(vit.heads.head.weight, std=0.1)         # it begins at zero, where nothing moves
    return vit.double().eval()


def attention_settings():
    cuda = torch.backends.cuda
    return [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled(),
            torch.backends.mha.get_fastpath_enabled()]


def test_attention_is_exact_and_its_kernels_are_as_before_also_after_an_exception():
    model, before, case = transformer(), attention_settings(), random_case()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert attention_settings() != before
        with pytest.raises(RuntimeError):
            meta_gradient(model, case[0][:, :2], *case[1:])
        assert attention_settings() == [*before[:-1], False]
    finally:
        torch.backends.mha.set_fastpath_enabled(before[-1])
    _, exact = exact_gradient(model, *case)
    for method, tolerance in (("jvp", 1e-9), ("unrolled", 1e-9), ("finite-difference", 2e-2)):
        assert relative_error(meta_gradient(model, *case, method=method, epsilon=1e-3)[1], exact) < tolerance
    assert attention_settings() == before


@pytest.mark.parametrize("modality", modalities())
def test_points_series_and_token_ids_are_exact_and_in_bfloat16_close(modality):
    model, x_l, y_l, x_u = modalities()[modality]
    _, exact = exact_gradient(model.eval(), x_l, y_l, x_u)
    for method, tolerance in (("jvp", 1e-9), ("unrolled", 1e-9), ("finite-difference", 1e-3)):
        assert relative_error(meta_gradient(model, x_l, y_l, x_u, method=method)[1], exact) < tolerance
    x_l, x_u = (x.float() if x.is_floating_point() else x for x in (x_l, x_u))
    _, gradient = meta_gradient(model.float(), x_l, y_l, x_u, dtype=torch.bfloat16)
    assert relative_error(gradient, exact) < 0.1


def test_activation_checkpointing_is_exact_and_of_the_reentrant_kind_refused_by_a_sentence():
    net, case = smooth_network().eval(), random_case()
    _, exact = exact_gradient(net, *case)
    methods = {"jvp": 1e-9, "unrolled": 1e-9, "finite-difference": 1e-3}
    if torch.__version__ < "2.15":
        del methods["jvp"]              # "You must implement the jvp function for custom autograd.Function"
    for method, tolerance in methods.items():
        _, gradient = meta_gradient(Checkpointed(net[:2], net[2:]), *case, method=method)
        assert relative_error(gradient, exact) < tolerance
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        meta_gradient(Checkpointed(net[:2], net[2:], use_reentrant=True), *case)


@pytest.mark.parametrize(("method", "in_place"), [*((method, False) for method in METHODS), ("unrolled", True)])
def test_a_compiled_model_is_exact(method, in_place):
    model, case = smooth_network().eval(), random_case()
    _, exact = exact_gradient(model, *case)
    if in_place:
        model.compile(backend="aot_eager")
    else:
        model = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        _, gradient = meta_gradient(model, *case, method=method)
        assert relative_error(gradient, exact) < (1e-3 if method == "finite-difference" else 1e-9)


def test_every_consistency_and_any_other_with_its_link_is_exact(monkeypatch):
    def hellinger(p, y):
        return (p.sqrt() - y.sqrt()).square().sum(dim=1)

    model, case = smooth_network().eval(), random_case()
    monkeypatch.setitem(CONSISTENCY, "squared Hellinger", Consistency(
        lambda z, y: hellinger(z.softmax(dim=1), y), lambda z: z.log_softmax(dim=1) / 2, lambda m: (2 * m).exp()))
    for name in CONSISTENCY:
        y, exact = exact_gradient(model, *case, consistency=hellinger if name == "squared Hellinger" else name)
        for method, tolerance in (("jvp", 1e-9), ("unrolled", 1e-9), ("finite-difference", 1e-3)):
            y_tilde, gradient = meta_gradient(model, *case, method=method, consistency=name)
            assert close(y_tilde, y, 10_000) and relative_error(gradient, exact) < tolerance, name


@pytest.mark.parametrize(("options", "message"), [
    ({"method": "newton"}, "'newton'; choose from jvp, finite-difference, unrolled"),
    ({"consistency": "l1"}, "'l1'; choose from mse, kl")])
def test_unknown_names_are_refused_with_the_choices(options, message):
    with pytest.raises(ValueError, match=message):
        meta_gradient(smooth_network(), *random_case(), **options)


class Merged(nn.Module):
    """A layer whose weight is the sum of two, added up in evaluation mode as adapters do."""

    def __init__(self, frozen=False):
        super().__init__()
        self.base = nn.Parameter(torch.randn(5, 3, dtype=torch.float64), requires_grad=False)
        self.delta = nn.Parameter(torch.randint(9, (5, 3)) / 8)         # so that adding and taking off is exact
        self.delta.data, self.base.data = self.delta.double(), self.base.mul(8).round() / 8
        self.merged, self.frozen = False, frozen

    def train(self, mode=True):
        mode = mode and not self.frozen
        if self.merged is mode:
            self.base.data += -self.delta if mode else self.delta
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return nn.functional.linear(x, self.base if self.merged else self.base + self.delta)


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("begin", [
    lambda model: model, lambda model: model.eval(), lambda model: model[1].eval(), lambda model: model[1][0].eval(),
    lambda model: model.eval()[1].train(), lambda model: model[1].train(False)[0].train()])
def test_layers_whose_train_does_work_are_called_and_afterwards_what_they_were(begin):
    torch.manual_seed(0)
    shared = nn.Dropout()
    model = nn.Sequential(Merged(), nn.Sequential(Merged(), shared, nn.Linear(3, 3).double()), Merged(frozen=True), shared)
    begin(model.train())
    before = modes(model), [w.clone() for w in model.parameters()], [module.merged for module in model.modules()
                                                                     if isinstance(module, Merged)]
    for failing in (False, True):
        with suppress(ZeroDivisionError), evaluation_mode(model):
            assert modes(model) == [False] * len(modes(model))
            assert model[0].merged and model[1][0].merged
            1 / (not failing)
        assert modes(model) == before[0]
        assert all(torch.equal(w, value) for w, value in zip(model.parameters(), before[1]))
        assert [module.merged for module in model.modules() if isinstance(module, Merged)] == before[2]


@pytest.mark.parametrize("last", [1, 2])
def test_an_interrupt_in_a_forward_pass_leaves_the_model_and_the_settings_of_torch_as_they_were(last):
    model, case, settings, passes = smooth_network(), random_case(), attention_settings(), []
    model[1].eval()
    before, values = modes(model), {key: value.clone() for key, value in model.state_dict().items()}

    def interrupt(*args):
        passes.append(args)
        if len(passes) == last:
            raise KeyboardInterrupt

    model[4].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        meta_gradient(model, *case)
    assert modes(model) == before and attention_settings() == settings
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_a_call_where_nothing_can_be_right_is_refused_by_a_sentence():
    model, case = smooth_network(), random_case()
    with parametrize.cached(), pytest.raises(ValueError, match="the weights are kept from earlier calls: call outside"):
        meta_gradient(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), torch.ones(2, 3), torch.tensor([0, 1]),
                      torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"the model gives the shape \(3, 2, 5\) for 3 examples in evaluation mode: expected"):
        meta_gradient(nn.Linear(3, 5), torch.ones(3, 2, 3), torch.tensor([0, 1, 2]), torch.ones(6, 2, 3))
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        meta_gradient(smooth_network().requires_grad_(False), *case)
    with torch.inference_mode():
        with pytest.raises(ValueError, match="torch.inference_mode.. made or surrounds .* take torch.no_grad"):
            meta_gradient(model, *case)
        made, inputs = smooth_network(), random_case()
    for arguments in ((made, *case), (model, *inputs)):
        with pytest.raises(ValueError, match="take torch.no_grad.. instead, and make data and model outside"):
            meta_gradient(*arguments)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_hides_all_its_weights_is_refused_by_a_sentence(method):
    class Hidden(nn.Module):
        def __init__(self, kept):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.kept = [kept(self.layer)]

        def forward(self, x):
            return self.kept[0](x)

    closure = [lambda layer: lambda x, w=layer.weight: nn.functional.linear(x, w)] * (method != "finite-difference")
    for kept in [lambda layer: torch.no_grad()(layer), *closure]:           # `check_model` says the rest
        with pytest.raises(ValueError, match="on no parameter of the model that requires a gradient: reach its weights by"):
            meta_gradient(Hidden(kept), torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(2, 3), method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_sparse_gradient_is_refused_by_every_method(method):
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2))
    x = torch.arange(9).view(3, 3)
    with pytest.raises(ValueError, match="the gradient of 0.weight is sparse"):
        meta_gradient(model, x, torch.tensor([0, 1, 0]), x, method)
