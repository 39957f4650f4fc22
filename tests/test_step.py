"""One whole step against a plain implementation: loops over samples, classes and weights, nothing shared with the code."""
import math
from functools import partial

import pytest
import torch
from oracle import close, modalities
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from metasemi import meta_gradient, squared_error, training_step, update_pseudo_labels

LR, MOMENTUM, DECAY = 0.05, 0.9, 1e-2


class Network(nn.Module):
    """Batch normalization and dropout, so that modes, the order of the passes and random numbers all matter."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.linear = nn.Dropout(0.3), nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(self.dropout(torch.tanh(self.bn(self.conv(x))).mean(dim=(2, 3))))


def make_model():
    torch.manual_seed(0)
    model = Network().double()
    with torch.no_grad():
        model(torch.randn(16, 3, 5, 5, dtype=torch.float64))
    return model


def softmax(row):
    top = max(value.item() for value in row)
    exponentials = [torch.exp(value - top) for value in row]
    total = sum(exponentials)
    return [e / total for e in exponentials]


def plain_step(model, velocity, x_l, y_l, x_u, *, beta, weight, lam, meta, x_u_strong=None):
    """Algorithm 2 line by line.  Returns the loss; weights and velocity are changed in place."""
    theta = list(model.parameters())
    classes = 3
    y_hat = None
    if meta or lam is not None:
        model.eval()
        y_hat = [[p.item() for p in softmax(row)] for row in model(x_u)]
    if meta:
        loss_l = sum(-torch.log(softmax(row)[y]) for row, y in zip(model(x_l), y_l)) / len(x_l)
        g = torch.autograd.grad(loss_l, theta)
        for i in range(len(x_u)):
            for j in range(classes):
                slope = torch.autograd.grad(softmax(model(x_u)[i])[j], theta)
                y_hat[i][j] -= beta * 2 * sum((s * d).sum().item() for s, d in zip(slope, g))
            clipped = [max(value, 0.0) for value in y_hat[i]]
            y_hat[i] = [value / sum(clipped) for value in clipped]

    model.train()
    loss = 0
    if lam is None:
        for row, y in zip(model(x_l), y_l):
            loss = loss - torch.log(softmax(row)[y]) / len(x_l)
    else:
        pairs = [(i % len(x_l), i % len(x_u)) for i in range(max(len(x_l), len(x_u)))]
        mixed = torch.stack([m * x_l[a] + (1 - m) * x_u[b] for m, (a, b) in zip(lam, pairs)])
        for m, (a, b), row in zip(lam.tolist(), pairs, model(mixed)):
            for j, p in enumerate(softmax(row)):
                y = m * (1.0 if j == y_l[a] else 0.0) + (1 - m) * y_hat[b][j]
                loss = loss + (y * (math.log(y) - torch.log(p)) if y > 0 else 0) / len(pairs)
    if meta:
        for i, row in enumerate(model(x_u if x_u_strong is None else x_u_strong)):
            loss = loss + weight * sum((p - y) ** 2 for p, y in zip(softmax(row), y_hat[i])) / len(x_u)

    gradients = torch.autograd.grad(loss, theta)
    with torch.no_grad():
        for w, v, d in zip(theta, velocity, gradients):
            v.mul_(MOMENTUM).add_(d + DECAY * w)
            w.sub_(LR * v)
    return loss.item()


@pytest.mark.parametrize("mix_up", [False, True])
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(("labeled", "unlabeled", "strong"), [(4, 4, False), (3, 5, True), (5, 2, False)])
def test_two_steps_of_every_ablation_row_equal_the_plain_implementation(labeled, unlabeled, strong, meta, mix_up):
    model, plain = make_model(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=MOMENTUM, weight_decay=DECAY)
    velocity = [torch.zeros_like(w) for w in plain.parameters()]
    for step in range(2):
        torch.manual_seed(step)
        x_l, x_u = (torch.randn(number, 3, 5, 5, dtype=torch.float64) for number in (labeled, unlabeled))
        y_l = torch.randint(0, 3, (labeled,))
        lam = torch.rand(max(labeled, unlabeled), dtype=torch.float64) if mix_up else None
        # beta is large, so that entries are clipped
        options = {"beta": 2.0, "weight": 0.7, "lam": lam, "meta": meta}
        if strong and meta:
            options["x_u_strong"] = x_u + torch.randn_like(x_u)
        torch.manual_seed(100 + step)
        model.eval()                                    # as an evaluation leaves it
        loss = training_step(model, optimizer, x_l, y_l, x_u, alpha=LR, **options).loss
        torch.manual_seed(100 + step)
        assert plain_step(plain, velocity, x_l, y_l, x_u, **options) == pytest.approx(loss.item(), rel=1e-10)
        for (name, value), expected in zip(model.state_dict().items(), plain.state_dict().values()):
            if "num_batches" not in name:
                assert close(value, expected, 10_000), name


def test_the_two_training_mode_passes_move_the_running_statistics_and_the_meta_step_does_not():
    for options, passes in (({"meta": True}, 2), ({"meta": False}, 1), ({"meta": True, "lam": torch.rand(4)}, 2),
                            ({"meta": False, "lam": torch.rand(4)}, 1)):
        model = Network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x_l, x_u = torch.randn(2, 4, 3, 5, 5)
        training_step(model, optimizer, x_l, torch.tensor([0, 1, 2, 0]), x_u, alpha=0.1, beta=0.1, **options)
        assert model.bn.num_batches_tracked == passes


def test_kl_consistency_and_every_method_make_the_step_that_the_meta_gradient_says():
    losses = {}
    for consistency in ("mse", "kl"):
        for method in ("jvp", "finite-difference", "unrolled"):
            model = make_model()
            torch.manual_seed(5)
            x_l, x_u = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
            result = training_step(model, torch.optim.SGD(model.parameters(), lr=0.1), x_l, torch.tensor([0, 1, 2, 0]),
                                   x_u, alpha=0.1, beta=0.5, method=method, consistency=consistency)
            losses[consistency, method] = result.loss.item()
            assert close(result.y_hat.sum(dim=1), torch.ones(4, dtype=torch.float64))
    assert losses["mse", "jvp"] == pytest.approx(losses["mse", "unrolled"], rel=1e-12)
    assert losses["kl", "jvp"] == pytest.approx(losses["kl", "unrolled"], rel=1e-12)
    assert losses["mse", "jvp"] == pytest.approx(losses["mse", "finite-difference"], rel=1e-3)
    assert losses["mse", "jvp"] != pytest.approx(losses["kl", "jvp"], rel=1e-3)


def test_bfloat16_step_keeps_float32_weights_statistics_and_losses():
    model = make_model().float()
    x_l, x_u = torch.randn(2, 4, 3, 5, 5)
    result = training_step(model, torch.optim.SGD(model.parameters(), lr=0.1), x_l, torch.tensor([0, 1, 2, 0]), x_u,
                           alpha=0.1, beta=0.1, lam=torch.rand(4), dtype=torch.bfloat16)
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32, torch.int64}
    assert result.loss.dtype == torch.float32 and result.loss.isfinite()


def test_alpha_is_the_largest_rate_of_the_groups_which_keep_their_ratios_and_none_leaves_them():
    model = make_model()
    optimizer = torch.optim.SGD([{"params": model.conv.parameters(), "lr": 0.01}, {"params": model.bn.parameters(), "lr": 0.0},
                                 {"params": model.linear.parameters()}], lr=0.1)
    x_l, x_u = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)

    def rates(**options):
        training_step(model, optimizer, x_l, torch.tensor([0, 1, 2, 0]), x_u, beta=0.1, **options)
        return [group["lr"] for group in optimizer.param_groups]

    before = [w.detach().clone() for w in model.bn.parameters()]
    assert rates() == rates(alpha=None) == [0.01, 0.0, 0.1]
    for alpha in (0.5, 0.0, 0.2):                           # zero, as at the end of a cosine, forgets no ratio
        assert rates(alpha=alpha) == pytest.approx([alpha / 10, 0.0, alpha])
    assert rates()[2] == 0.2 and all(torch.equal(w, a) for w, a in zip(model.bn.parameters(), before))


@pytest.mark.parametrize("modality", modalities())
def test_adamw_with_two_groups_and_a_scheduler_of_its_own_makes_the_steps_of_a_plain_loop(modality):
    weights = []
    for own in (False, True):
        model, x_l, y_l, x_u = modalities()[modality]
        first, *rest = model.parameters()
        optimizer = torch.optim.AdamW([{"params": [first], "lr": 1e-3}, {"params": rest, "weight_decay": 0.1}], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        torch.manual_seed(0)
        for _ in range(3):
            if own:
                y_hat = update_pseudo_labels(*meta_gradient(model, x_l, y_l, x_u), beta=0.1)
                optimizer.zero_grad()
                (cross_entropy(model(x_l), y_l) + 2 * squared_error(model(x_u), y_hat).mean()).backward()
                optimizer.step()
            else:
                training_step(model, optimizer, x_l, y_l, x_u, beta=0.1, weight=2)
            scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3 / 8, 1e-2 / 8]
        weights.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    assert close(*weights, 10_000)


class Checkpointed(nn.Module):
    """A network that keeps no activations of its own; its parameters are those of the network."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=False)


@pytest.mark.parametrize("wrapped", [lambda model: torch.compile(model, backend="aot_eager"), Checkpointed])
def test_a_compiled_model_and_one_with_activation_checkpointing_make_the_same_step(wrapped):
    torch.manual_seed(0)
    x_l, x_u = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    y_l, lam = torch.tensor([0, 1, 2, 0]), torch.rand(4, dtype=torch.float64)
    method = "unrolled" if torch.__version__ < "2.15" and wrapped is Checkpointed else "jvp"
    for options in ({"lam": lam, "method": method}, {"lam": lam, "meta": False}):
        models = []
        for wrap in (wrapped, lambda model: model):
            model = make_model()
            model.dropout.p = 0.0           # its random numbers are drawn in other orders
            model.bn.momentum = 0.0         # and a recomputed pass moves running statistics once more
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=MOMENTUM)
            for _ in range(2):
                training_step(wrap(model), optimizer, x_l, y_l, x_u, beta=0.5, **options)
            models.append(model)
        assert all(close(a, b, 10_000) for a, b in zip(*(model.parameters() for model in models)))


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, momentum=MOMENTUM), torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("spoiled", [0, 1, 3])
def test_an_update_that_is_left_out_leaves_a_fused_optimizer_as_if_it_had_not_been_tried(optimizer, spoiled):
    torch.manual_seed(0)
    x, y_l = torch.randn(3, 4, 3, 5, 5), torch.tensor([0, 1, 2, 0])
    weights = []
    for without in (False, True):
        model = nn.Sequential(nn.Flatten(), nn.Linear(75, 3))
        nn.init.ones_(model[1].weight), nn.init.zeros_(model[1].bias)
        fused = optimizer(model.parameters(), lr=0.1, fused=True)
        for step in range(4):
            if step == spoiled and not without:
                assert not training_step(model, fused, x[0] / 0, y_l, x[1], beta=0.1).finite
            if step < 3:
                assert training_step(model, fused, x[step], y_l, x[1], beta=0.1).finite
        fused.zero_grad()
        cross_entropy(model(x[0]), y_l).backward()
        fused.step()                        # one of the caller's own, which nothing holds back
        weights.append(model[1].weight.detach())
    assert torch.equal(*weights) and weights[0].isfinite().all()


def test_an_autocast_around_a_step_changes_nothing_before_the_callers_own_operations():
    torch.manual_seed(0)
    x_l, x_u, y_l, lam = *torch.randn(2, 4, 3, 5, 5), torch.tensor([0, 1, 2, 0]), torch.rand(4)
    for options in ({"method": "jvp"}, {"method": "finite-difference"}, {"method": "unrolled"}, {"meta": False}):
        results = []
        for enabled in (False, True):
            model = make_model().float()
            model.dropout.p = 0.0
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                results.append(training_step(model, torch.optim.SGD(model.parameters(), lr=0.1), x_l, y_l, x_u, beta=0.5,
                                             lam=lam, **options))
        for a, b in zip(*([r.y_tilde, r.y_hat, r.loss] for r in results)):
            assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize(("options", "message"), [
    ({"epsilon": 0.0, "method": "finite-difference"}, "epsilon is 0.0: expected a length above 0"),
    ({"x_u": None}, "x_u is None: only the supervised baseline, meta=False and lam=None, needs no unlabeled examples"),
    ({"x_u": None, "meta": False, "lam": torch.rand(4)}, "x_u is None"),
    ({"y_l": torch.tensor([0, 1, 2]), "meta": False}, r"y_l is torch.int64 of the shape \(3,\)"),
    ({"lam": torch.rand(3)}, r"lam has the shape \(3,\): expected \(6,\), since 4 labeled and 6 unlabeled"),
    ({"x_u_strong": torch.ones(4, 3, 5, 5)}, r"x_u_strong has the shape \(4, 3, 5, 5\): expected a second view"),
    ({"x_u_strong": torch.ones(6, 3, 5, 5), "meta": False}, "for the consistency loss, and meta=True")])
def test_wrong_arguments_are_refused_by_a_sentence_and_no_weight_has_changed(options, message):
    model = Network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = {"x_l": torch.ones(4, 3, 5, 5), "y_l": torch.tensor([0, 1, 2, 0]), "x_u": torch.ones(6, 3, 5, 5), **options}
    with pytest.raises(ValueError, match=message):
        training_step(model, torch.optim.SGD(model.parameters(), lr=0.1), **batch)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
