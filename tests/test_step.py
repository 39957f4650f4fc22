"""One whole step against a plain implementation: loops over samples, classes and weights, nothing shared with the code."""
import math
import re
from functools import partial
from itertools import product

import pytest
import torch
from oracle import Checkpointed, close, modalities
from torch import nn
from torch.nn.functional import cross_entropy

from metasemi import METHODS, meta_gradient, squared_error, training_step, update_pseudo_labels

LR, MOMENTUM, DECAY = 0.05, 0.9, 1e-2
Y_L = torch.tensor([0, 1, 2, 0])


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


def test_kl_consistency_and_every_method_make_the_step_that_the_meta_gradient_says():
    losses = {}
    for consistency, method in product(("mse", "kl"), METHODS):
        model = make_model()
        torch.manual_seed(5)
        x_l, x_u = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
        result = training_step(model, torch.optim.SGD(model.parameters(), lr=0.1), x_l, Y_L, x_u, alpha=0.1, beta=0.5,
                               method=method, consistency=consistency)
        losses[consistency, method] = result.loss.item()
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


def test_alpha_is_the_largest_rate_of_the_groups_also_of_late_ones_which_keep_their_ratios_and_none_leaves_them():
    model = make_model()
    model.late = nn.Linear(1, 1).double()
    optimizer = torch.optim.SGD([{"params": model.conv.parameters(), "lr": 0.01}, {"params": model.bn.parameters(), "lr": 0.0},
                                 {"params": model.linear.parameters()}], lr=0.1)
    x_l, x_u = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)

    def rates(**options):
        training_step(model, optimizer, x_l, Y_L, x_u, beta=0.1, **options)
        return [group["lr"] for group in optimizer.param_groups]

    before = [w.detach().clone() for w in model.bn.parameters()]
    assert rates() == rates(alpha=None) == [0.01, 0.0, 0.1]
    for alpha in (0.5, 0.0, 0.2):                           # zero, as at the end of a cosine, forgets no ratio
        assert rates(alpha=alpha) == pytest.approx([alpha / 10, 0.0, alpha])
    assert rates()[2] == 0.2 and all(torch.equal(w, a) for w, a in zip(model.bn.parameters(), before))
    optimizer.add_param_group({"params": model.late.parameters(), "lr": 0.05})
    assert rates(alpha=0.4) == pytest.approx([0.04, 0.0, 0.4, 0.2])


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


@pytest.mark.parametrize("wrapped", [partial(torch.compile, backend="aot_eager"), partial(Checkpointed, nn.Identity())])
def test_a_compiled_model_and_one_with_activation_checkpointing_make_the_same_step(wrapped):
    torch.manual_seed(0)
    x_l, x_u = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    y_l, lam = torch.tensor([0, 1, 2, 0]), torch.rand(4, dtype=torch.float64)
    method = "unrolled" if torch.__version__ < "2.15" and wrapped.func is Checkpointed else "jvp"
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
    *(({"epsilon": epsilon}, f"epsilon is {epsilon}: expected a length between 1.2e-07 and 8.4e+06, since the weights are")
      for epsilon in (0.0, -1.0, math.nan, math.inf, 1e-300, 1e300)),
    *(({name: value}, f"{name} is {value}: expected a finite number, 0 or more")
      for name in ("alpha", "beta", "weight") for value in (math.nan, math.inf, -0.1)),
    ({"beta": None}, "beta is missing: expected the meta learning rate, or meta=False for no meta step"),
    ({"x_u": None}, "x_u is None: only the supervised baseline, meta=False and lam=None, needs no unlabeled examples"),
    ({"x_u": None, "meta": False, "lam": torch.rand(4)}, "x_u is None"),
    ({"x_u": {"pixels": torch.ones(6, 3, 5, 5)}}, "x_u is a dict: expected a tensor; put a network of several inputs into a"),
    ({"y_l": torch.tensor([0, 1, 2]), "meta": False}, "y_l is torch.int64 of the shape (3,): expected the class index"),
    ({"y_l": torch.tensor([0.0, 1.0, 2.0, 0.0])}, "y_l is torch.float32"),
    ({"y_l": torch.eye(4, 3, dtype=torch.int64)}, "of the shape (4, 3)"),
    ({"x_l": torch.ones(0, 3, 5, 5), "y_l": Y_L[:0]}, "x_l has the shape (0, 3, 5, 5): expected (B, ...) with at least one"),
    ({"x_u": torch.ones(0, 3, 5, 5)}, "x_u has the shape (0, 3, 5, 5)"),
    ({"x_l": torch.tensor(1.0)}, "x_l has the shape ()"),
    *(({"y_l": torch.tensor([0, wrong, 2, 0]), "lam": lam, "meta": meta},
       f"y_l holds the class {wrong}: expected 0 to 2, since the model gives 3")
      for wrong in (3, -1, -100) for lam in (None, torch.rand(6)) for meta in (True, False)),
    ({"lam": torch.rand(3)}, "lam has the shape (3,): expected (6,), since 4 labeled and 6 unlabeled"),
    ({"lam": [0.5] * 5 + [1.5]}, "lam reaches from 0.5 to 1.5: expected shares between 0 and 1"),
    ({"lam": torch.tensor([-1e-3] * 6)}, "lam reaches from -0.001 to -0.001"),
    ({"lam": torch.tensor([math.nan] * 6), "meta": False}, "lam reaches from nan to nan"),
    ({"x_u_strong": torch.ones(4, 3, 5, 5)}, "x_u_strong has the shape (4, 3, 5, 5): expected a second view"),
    ({"x_u_strong": torch.ones(6, 3, 5, 5), "meta": False}, "for the consistency loss, and meta=True")])
def test_wrong_arguments_are_refused_by_a_sentence_and_nothing_has_moved(options, message):
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [w.detach().clone() for w in model.parameters()]
    batch = {"x_l": torch.ones(4, 3, 5, 5), "y_l": torch.tensor([0, 1, 2, 0]), "x_u": torch.ones(6, 3, 5, 5), "beta": 0.1}
    with pytest.raises(ValueError, match=re.escape(message)):
        training_step(model, optimizer, **batch | options)
    assert all(torch.equal(w, value) for w, value in zip(model.parameters(), before))
    assert optimizer.param_groups[0]["lr"] == 0.1 and not optimizer.state


class Outputs(nn.Linear):
    """Logits, in training mode with something beside them."""

    def forward(self, x):
        y = super().forward(x)
        return (y, x) if self.training else y


@pytest.mark.parametrize(("model", "meta", "message"), [
    (nn.Linear(3, 1), True, "the model gives the shape (4, 1) for 4 examples in evaluation mode: expected .* K at least 2"),
    (nn.Linear(3, 1), False, "the model gives the shape (4, 1) for 4 examples in training mode"),
    (Outputs(3, 2), True, "the model gives a tuple for 4 examples in training mode: .*; put it into a module whose"),
    (Outputs(3, 2), False, "the model gives a tuple for 4 examples in training mode"),
    (nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 2)), True,
     "the gradient of 0.weight is sparse: make its embedding with sparse=False"),
    (nn.Sequential(nn.EmbeddingBag(9, 4, sparse=True), nn.Linear(4, 2)), False, "the gradient of 0.weight is sparse"),
    (nn.DataParallel(nn.Linear(3, 2)), True, "the model is in a DataParallel, .*: pass the module inside it, one"),
    (nn.Sequential(nn.DataParallel(nn.Linear(3, 2))), False, "the model is in a DataParallel"),
    (nn.LazyLinear(2), True, "the parameter weight has no shape yet: give its layer the number of its inputs")])
def test_models_that_the_step_does_not_fit_are_refused_by_a_sentence_before_any_weight_moves(model, meta, message):
    embeds = isinstance(model, nn.Sequential) and not isinstance(model[0], nn.DataParallel)
    x = torch.randint(9, (4, 3)) if embeds else torch.randn(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [] if isinstance(model, nn.LazyLinear) else [w.detach().clone() for w in model.parameters()]
    with pytest.raises(ValueError, match=message.replace("(4, 1)", r"\(4, 1\)")):
        training_step(model, optimizer, x, torch.tensor([0, 1, 0, 1]), x, beta=0.1, meta=meta)
    assert all(torch.equal(w, value) for w, value in zip(model.parameters(), before))


@pytest.mark.parametrize("options", [{}, {"meta": False}, {"lam": [0.5] * 4}, {"lam": [0.5] * 4, "meta": False}])
def test_where_looking_would_wait_for_the_device_wrong_classes_and_shares_make_a_step_that_is_left_out(options, monkeypatch):
    for name in ("losses.check_classes", "pseudo_labels.check_shares"):
        monkeypatch.setattr(f"metasemi.{name}", lambda *args: None)
    x_l, x_u = torch.randn(2, 4, 3, 5, 5)
    lam = torch.tensor([0.5, 1.0, 0.0, 1.5])
    wrong_labels = [{"y_l": torch.tensor(labels)} for labels in ([0, 3, 2, 0], [0, 1, -100, 0])]
    wrong_shares = [{"lam": lam}, {"lam": -lam}] if "lam" in options else []
    for wrong in [{}, *wrong_labels, *wrong_shares]:
        model = Network()
        before = [w.detach().clone() for w in model.parameters()]
        result = training_step(model, torch.optim.SGD(model.parameters(), lr=0.1),
                               **{"x_l": x_l, "y_l": torch.tensor([0, 1, 2, 0]), "x_u": x_u, "beta": 0.1} | options | wrong)
        assert bool(result.finite) is not bool(wrong)
        assert all(torch.equal(w, value) for w, value in zip(model.parameters(), before)) is bool(wrong)


def test_only_the_gradients_that_the_optimizer_owns_are_cleared_and_judged():
    model, head_only = make_model(), make_model()
    for each in (model, head_only):
        each.conv.requires_grad_(each is head_only), each.bn.requires_grad_(each is head_only)
    optimizers = [torch.optim.SGD(each.linear.parameters(), lr=0.1) for each in (model, head_only)]
    x_l, x_u = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    for step, spoiled in enumerate((False, True, False)):
        results = []
        for each, optimizer in zip((model, head_only), optimizers):
            torch.manual_seed(step)
            each.bn.reset_running_stats()
            results.append(training_step(each, optimizer, x_l / (not spoiled), torch.tensor([0, 1, 2, 0]), x_u, beta=0.0))
        assert [bool(result.finite) for result in results] == [not spoiled] * 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), head_only.parameters()))
    assert head_only.conv.weight.grad.isnan().any()         # the caller's own


class Branches(nn.Module):
    """Three branches, the last of which takes no part at first; of the others one does, as with stochastic depth."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.branches, self.active = nn.ModuleList(nn.Linear(6, 3) for _ in range(3)), [0]

    def forward(self, x):
        return sum(self.branches[i](x) for i in self.active)


@pytest.mark.parametrize("groups", ["one", "one of its own fused, beside one that is not", "one not fused, beside fused ones"])
def test_fused_sgd_of_weights_that_get_their_first_gradient_late_is_what_plain_sgd_is(groups):
    torch.manual_seed(0)
    x, y_l = torch.randn(5, 4, 6), torch.tensor([0, 1, 2, 0])
    results = []
    for fused in (False, True):
        model = Branches()
        first, *rest = model.branches.parameters()
        if groups == "one" or not fused:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=MOMENTUM, weight_decay=DECAY, fused=fused)
        else:
            own = groups.startswith("one of its own")
            optimizer = torch.optim.SGD([{"params": [first], "fused": own}, {"params": rest}], lr=0.1, momentum=MOMENTUM,
                                        weight_decay=DECAY, fused=None if own else True)
        for step, active in enumerate(([0], [1], [0, 1], [0, 2], [1, 2])):
            model.active = active
            assert training_step(model, optimizer, x[step], y_l, x[0], beta=0.1).finite
            assert not training_step(model, optimizer, x[step] / 0, y_l, x[0], beta=0.1).finite
        results.append([*model.parameters(), *(optimizer.state[w]["momentum_buffer"] for w in model.parameters())])
    assert all(close(a, b) for a, b in zip(*results))


def test_fused_sgd_reads_momenta_of_another_layout_right_and_never_waits(monkeypatch):
    x, y_l = torch.randn(4, 3, 5, 5), torch.tensor([0, 1, 2, 0])
    results = []
    for loaded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=MOMENTUM, fused=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__bool__", lambda value: pytest.fail("the host looked at a value"))
            training_step(model, optimizer, x, y_l, x, beta=0.1)
        if loaded:
            state = optimizer.state[model[0].weight]
            state["momentum_buffer"] = state["momentum_buffer"].contiguous(memory_format=torch.channels_last)
        training_step(model, optimizer, x, y_l, x, beta=0.1)
        results.append([w.detach() for w in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_fused_sgd_that_would_be_another_optimizer_is_refused_by_a_sentence():
    model, x = nn.Linear(3, 2), torch.randn(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    with pytest.raises(ValueError, match="a fused optimizer with dampening begins otherwise .*: take fused=False"):
        training_step(model, optimizer, x, torch.tensor([0, 1]), x, beta=0.1)
    sliced = nn.Linear(6, 2)
    sliced.weight = nn.Parameter(torch.randn(2, 12)[:, ::2])
    optimizer = torch.optim.SGD(sliced.parameters(), lr=0.1, momentum=0.9, fused=True)
    with pytest.raises(ValueError, match="a weight of the shape .2, 6. has gaps in memory, .*: make it contiguous"):
        training_step(sliced, optimizer, torch.randn(2, 6), torch.tensor([0, 1]), torch.randn(2, 6), beta=0.1)


def test_every_telemetry_value_is_the_one_computed_by_hand():
    # The logits are those of the input.  Labeled: p = (1/4, 3/4) and (1/2, 1/2), classes 0 and 0.
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    nn.init.eye_(model[0].weight)
    three, x_u = math.log(3), torch.tensor([[0.0, 1.0], [math.log(9), 1.0]], dtype=torch.float64)
    x_l, y_l = torch.tensor([[0.0, three], [0.0, 0.0]], dtype=torch.float64), torch.tensor([0, 0])
    # g, the mean of (p - y) x^T, is [[0, -3/8 log 3], [0, 3/8 log 3]], and moves the logits of both rows of x_u by
    # (-3/8 log 3, 3/8 log 3).  So J g of class 0 is -(3/4) log 3 p_0 p_1.
    p = [1 / (1 + math.e), 9 / (9 + math.e)]
    speed = [2 * 0.75 * three * a * (1 - a) for a in p]         # minus the gradient of class 0
    beta = 1.0
    shift = [min(a + beta * v, 1.0) - a for a, v in zip(p, speed)]
    clipped = sum((1 - a) < beta * v for a, v in zip(p, speed))
    assert clipped == 1                                         # so the second row loses its other class
    y_hat = [a + s for a, s in zip(p, shift)]
    label_loss, norm = (math.log(4) + math.log(2)) / 2, math.sqrt(2) * 0.375 * three
    expected = {"label-loss": label_loss, "label-acc": 0.5, "meta-shift": sum(shift) / 2, "meta-clipped": clipped / 4,
                "meta-g-norm": norm, "unlabel-loss": sum(2 * s ** 2 for s in shift) / 2}

    def telemetry(**options):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        result = training_step(model, optimizer, x_l, y_l, x_u, **options)
        return {name: value.item() for name, value in result.telemetry.items()}

    assert telemetry(beta=beta) == pytest.approx(expected, rel=1e-12)
    assert telemetry(meta=False) == pytest.approx({"label-loss": label_loss, "label-acc": 0.5}, rel=1e-12)
    # lam = 0 leaves the unlabeled examples and y_hat: KL(y_hat || p).
    mixed = sum(y * math.log(y / a) + ((1 - y) * math.log((1 - y) / (1 - a)) if y < 1 else 0) for y, a in zip(y_hat, p)) / 2
    assert telemetry(beta=beta, lam=[0.0, 0.0]) == pytest.approx(expected | {"interp-loss": mixed}, rel=1e-12)
    # lam = 1 the labeled ones: KL(y || p) is their cross-entropy.
    assert telemetry(meta=False, lam=[1.0, 1.0]) == pytest.approx({"interp-loss": label_loss}, rel=1e-12)
