"""The meta-gradient against double backward through the virtual step, in float64."""
import shutil

import pytest
import torch
from oracle import close, double_backward, exact_gradient, random_case, relative_error, smooth_network
from torch import nn

from metasemi import METHODS, meta_gradient, update_pseudo_labels
from metasemi.meta_gradient import compiled_jvp
from models import NETWORKS, build_model
from models.layers import ConvBN

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


@pytest.mark.parametrize("factor", [0.5, 2, -1, 4, 6, EPSILON ** 2])
def test_a_wrong_factor_is_far_outside_every_tolerance(factor):
    model, case = smooth_network().eval(), random_case()
    _, exact = exact_gradient(model, *case)
    for method in METHODS:
        _, gradient = meta_gradient(model, *case, method=method)
        assert relative_error(factor * gradient, exact) > 0.1


def test_float32_jvp_agrees_with_the_float64_oracle_on_convlarge(networks):
    _, exact = exact_gradient(networks["convlarge"], *IMAGES)
    model = build_model("convlarge", 10).eval()
    model.load_state_dict(networks["convlarge"].state_dict())
    x_l, y_l, x_u = IMAGES
    _, gradient = meta_gradient(model, x_l.float(), y_l, x_u.float())
    assert gradient.dtype == torch.float32
    assert relative_error(gradient, exact) < 1e-5


def test_bfloat16_jvp_is_within_two_percent_on_convlarge_and_leaves_float32_weights(networks):
    _, exact = exact_gradient(networks["convlarge"], *IMAGES)
    model = build_model("convlarge", 10).eval()
    model.load_state_dict(networks["convlarge"].state_dict())
    x_l, y_l, x_u = IMAGES
    y_tilde, gradient = meta_gradient(model, x_l.float(), y_l, x_u.float(), dtype=torch.bfloat16)
    assert y_tilde.dtype == gradient.dtype == torch.float32
    assert {w.dtype for w in model.parameters()} == {torch.float32}
    assert 1e-6 < relative_error(gradient, exact) < 2e-2


def test_the_virtual_step_is_exactly_zero_and_its_derivative_is_not():
    _, gradient, g_u = double_backward(smooth_network().eval(), *random_case())
    assert all(torch.equal(d, torch.zeros_like(d)) for d in g_u)
    assert gradient.abs().max() > 1e-4


def test_torch_func_jvp_says_the_same(networks):
    x_l, y_l, x_u = IMAGES
    for model in networks.values():
        theta = dict(model.named_parameters())
        g = dict(zip(theta, torch.autograd.grad(nn.functional.cross_entropy(model(x_l), y_l), list(theta.values()))))
        y, J_g = torch.func.jvp(lambda t, model=model: torch.func.functional_call(model, t, (x_u,)).softmax(dim=1),
                                ({k: w.detach() for k, w in theta.items()},), (g,))
        y_tilde, gradient = meta_gradient(model, x_l, y_l, x_u)
        assert close(y_tilde, y, 10_000) and relative_error(gradient, 2 * J_g) < 1e-9


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("consistency", ["mse", "kl"])
def test_the_compiled_jvp_equals_double_backward_and_leaves_the_model_as_it_was(consistency):
    torch.manual_seed(2)
    model = nn.Sequential(ConvBN(3, 4, 3), nn.LeakyReLU(0.1, inplace=True), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    model, case = model.double(), random_case()
    model(case[0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method = compiled_jvp()
    for _ in range(2):
        y_tilde, gradient = meta_gradient(model, *case, method=method, consistency=consistency)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    y, exact = exact_gradient(model.eval(), *case, consistency=consistency)
    assert close(y_tilde, y, 10_000) and relative_error(gradient, exact) < 1e-9


def test_rows_of_the_gradient_sum_to_zero():
    model, case = smooth_network().eval(), random_case()
    for method in METHODS:
        gradient = meta_gradient(model, *case, method=method)[1]
        assert gradient.sum(dim=1).abs().max() < 1e-10 * gradient.abs().max()


def test_the_improved_label_is_to_first_order_the_prediction_after_a_labeled_step_of_twice_beta():
    model, (x_l, y_l, x_u) = smooth_network().eval(), random_case()
    y_tilde, gradient = meta_gradient(model, x_l, y_l, x_u)

    def gap(beta):
        moved = smooth_network().eval()
        torch.nn.functional.cross_entropy(moved(x_l), y_l).backward()
        with torch.no_grad():
            for w in moved.parameters():
                w -= 2 * beta * w.grad
            return (update_pseudo_labels(y_tilde, gradient, beta) - moved(x_u).softmax(dim=1)).norm().item()

    assert gap(2e-3) / gap(1e-3) == pytest.approx(4, rel=0.05)


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


def test_unknown_names_are_refused_with_the_choices():
    model, case = smooth_network(), random_case()
    with pytest.raises(ValueError, match="'newton'; choose from jvp, finite-difference, unrolled"):
        meta_gradient(model, *case, method="newton")
    with pytest.raises(ValueError, match="'l1'; choose from mse, kl"):
        meta_gradient(model, *case, consistency="l1")
