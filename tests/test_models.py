from collections import OrderedDict

import pytest
import torch
import torchvision
from oracle import close
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp
from torch.utils.flop_counter import FlopCounterMode

from models import NETWORKS, build_model
from models.layers import ConvBN
from models.shakeshake import Block, shake


@pytest.mark.parametrize(("name", "parameters", "width"), [
    ("convlarge", 3_121_802, 128), ("convsmall", 49_754, 16), ("wideresnet", 1_467_610, 128), ("shakeshake", 26_192_922, 384),
    ("resnet18", 11_181_642, 512), ("resnet50", 23_528_522, 2048)])
def test_parameters_and_feature_width(name, parameters, width):
    model = build_model(name, 10).eval()
    assert sum(w.numel() for w in model.parameters()) == parameters
    with torch.no_grad():
        x = torch.randn(2, 3, 16, 16)
        features = model.features(x)
        assert features.shape == (2, width)
        assert torch.equal(model(x), model.classifier(features))


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (32, 32), (64, 64)])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_size_from_sixteen_up_and_any_number_of_classes(name, size):
    with torch.no_grad():
        assert build_model(name, 7).eval()(torch.randn(1, 3, *size)).shape == (1, 7)


def test_convlarge_costs_731_million_multiply_adds_an_image():
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_model("convlarge", 10)(torch.randn(1, 3, 32, 32))
    assert round(counter.get_total_flops() / 2e6) == 731


@pytest.mark.parametrize("stride", [1, 2])
def test_batch_norm_folded_into_the_convolution_equals_the_two_layers(stride):
    torch.manual_seed(0)
    layer = ConvBN(3, 5, 3, stride, 1, momentum=0.5).double()
    nn.init.normal_(layer.bn.weight), nn.init.normal_(layer.bn.bias)
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    for _ in range(3):
        assert torch.equal(layer.train()(x), layer.bn(layer.conv(x)))
    folded = layer.eval()(x)
    assert close(folded, layer.bn(layer.conv(x)))


@pytest.mark.parametrize("moving", [{"x"}, {"bn.weight"}, {"bn.bias", "x"}, {"conv.weight", "bn.weight"},
                                    {"conv.weight", "bn.bias", "x"}])
def test_the_forward_mode_derivative_of_our_layers_is_that_of_torchs_whatever_moves(moving):
    torch.manual_seed(0)
    ours, theirs = ConvBN(3, 5, 3).double().eval(), nn.BatchNorm2d(5).double().eval()
    for values in (ours.bn.weight.data, ours.bn.bias.data, ours.bn.running_mean, ours.bn.running_var.fill_(0)):
        values += torch.rand(5).double() + 0.5
    theirs.load_state_dict(ours.bn.state_dict())
    values = {"x": torch.randn(4, 3, 9, 9).double(), **{name: w.detach() for name, w in ours.named_parameters()}}
    directions = {name: torch.randn_like(value) for name, value in values.items()}

    def derivative(layer):
        with forward_ad.dual_level():
            dual = {name: forward_ad.make_dual(value, directions[name]) if name in moving else value
                    for name, value in values.items()}
            return forward_ad.unpack_dual(functional_call(layer, dual, (dual.pop("x"),)))

    expected, *found = (derivative(layer) for layer in (
        nn.Sequential(OrderedDict(conv=ours.conv, bn=theirs)), nn.Sequential(OrderedDict(conv=ours.conv, bn=ours.bn)), ours))
    for each in found:
        assert close(each.primal, expected.primal) and close(each.tangent, expected.tangent)


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_mode_draws_no_random_number_and_training_mode_of_a_stochastic_network_does(name):
    model = build_model(name, 10)
    x, state = torch.randn(2, 3, 16, 16), torch.get_rng_state()
    with torch.no_grad():
        first = model.eval()(x)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model(x), first)
        model.train()(x)
    assert torch.equal(torch.get_rng_state(), state) == (name not in ("convlarge", "convsmall", "shakeshake"))


def test_wideresnet_is_initialized_and_normalized_as_specified():
    torch.manual_seed(0)
    model = build_model("wideresnet", 10)
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.001}
    conv = model.blocks[-1].conv2.weight                                # 128 -> 128, fan-out 1152, gain of LeakyReLU(0.1)
    assert conv.std().item() == pytest.approx((2 / 1.01 / 1152) ** 0.5, rel=0.02)
    assert model.classifier.weight.std().item() == pytest.approx((2 / 138) ** 0.5, rel=0.1)
    assert [block.activate_before_shortcut for block in model.blocks] == [True] + [False] * 11


@pytest.mark.parametrize(("channels", "stride"), [((6, 6), 1), ((6, 8), 1), ((6, 12), 2)])
def test_a_block_of_shakeshake_activates_before_its_branches_and_before_a_shortcut_that_halves(channels, stride):
    torch.manual_seed(0)
    block, x = Block(*channels, stride).double().eval(), torch.randn(2, 6, 8, 8).double()
    a, b = (second(first(x.relu()).relu()) for _, first, _, second in block.branches)
    shortcut = block.shortcut(x if stride == 1 else x.relu())
    assert close(block(x), shortcut + (a + b) / 2)


def test_shake_uses_one_gate_for_the_value_and_another_for_every_derivative():
    torch.manual_seed(0)
    a, b, da, db, weight = torch.randn(5, 4, 2, 3, 3, dtype=torch.float64)

    def shaken(a, b):
        torch.manual_seed(7)
        return shake(a, b, training=True)

    value, tangent = jvp(shaken, (a, b), (da, db))
    torch.manual_seed(7)
    forward_gate, backward_gate = torch.rand(2, 4, 1, 1, 1).double()
    assert close(value, forward_gate * a + (1 - forward_gate) * b)
    assert close(tangent, backward_gate * da + (1 - backward_gate) * db)
    a.requires_grad_(), b.requires_grad_()
    to_a, to_b = torch.autograd.grad((shaken(a, b) * weight).sum(), (a, b))
    assert close(to_a, backward_gate * weight) and close(to_b, (1 - backward_gate) * weight)
    assert close(shake(a, b, training=False), (a + b) / 2)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_residual_networks_are_those_of_torchvision_with_its_weights(name):
    theirs = getattr(torchvision.models, name)(num_classes=7).eval()
    ours = build_model(name, 7).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        assert close(ours(x), theirs(x), 1000)
