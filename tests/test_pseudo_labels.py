import math

import numpy as np
import pytest
import torch
from oracle import close

from metasemi import cross_domain_mixup, kl_divergence, learning_rate, ramp, squared_error, update_pseudo_labels


def test_meta_step_moves_clips_at_zero_and_renormalizes():
    y_tilde = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]], dtype=torch.float64)
    gradient = torch.tensor([[1.0, -0.5, -0.5], [-0.2, 0.2, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.4, 0.35, 0.25], [0.92, 0.08, 0.0]], dtype=torch.float64)
    assert close(update_pseudo_labels(y_tilde, gradient, 0.1), expected)
    # At beta = 1 the first row is (-0.5, 0.8, 0.7): clipped, then over 1.5; the second (1.1, -0.1, 0): then over 1.1.
    expected = torch.tensor([[0, 0.8 / 1.5, 0.7 / 1.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    assert close(update_pseudo_labels(y_tilde, gradient, 1.0), expected)


def test_a_meta_step_of_zero_changes_nothing():
    y_tilde = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.375, 0.5]])
    assert torch.equal(update_pseudo_labels(y_tilde, torch.randn(2, 3), 0.0), y_tilde)


@pytest.mark.parametrize("shape", [(3, 2, 2), (7,), ()])
@pytest.mark.parametrize(("labeled", "unlabeled"), [(4, 4), (2, 5), (4, 3)])
def test_mixup_equals_an_explicit_loop_that_repeats_the_smaller_batch(labeled, unlabeled, shape):
    torch.manual_seed(0)
    pairs = max(labeled, unlabeled)
    x_l, x_u, lam = torch.randn(labeled, *shape), torch.randn(unlabeled, *shape), torch.rand(pairs)
    y_l, y_hat = torch.eye(5)[:labeled], torch.rand(unlabeled, 5)
    x_in, y_in = cross_domain_mixup(x_l, y_l, x_u, y_hat, lam)
    assert x_in.shape == (pairs, *shape) and y_in.shape == (pairs, 5)
    for i in range(pairs):
        a, b = i % labeled, i % unlabeled
        assert close(x_in[i], lam[i] * x_l[a] + (1 - lam[i]) * x_u[b])
        assert close(y_in[i], lam[i] * y_l[a] + (1 - lam[i]) * y_hat[b])


@pytest.mark.parametrize("lam", [np.array([0.25, 1.0]), torch.tensor([0.25, 1.0], dtype=torch.float64), [0.25, 1.0]])
def test_mixup_weights_take_the_type_of_the_examples(lam):
    batch = torch.randn(2, 3), torch.eye(5)[:2], torch.randn(2, 3), torch.rand(2, 5)
    expected = cross_domain_mixup(*batch, torch.tensor([0.25, 1.0]))
    for value, other in zip(cross_domain_mixup(*batch, lam), expected):
        assert value.dtype == torch.float32 and torch.equal(value, other)


@pytest.mark.parametrize(("x_l", "x_u", "lam", "message"), [
    (torch.ones(2, 3), torch.ones(4, 3), torch.ones(2), r"lam has the shape \(2,\): expected \(4,\), since 2 labeled and 4"),
    (torch.ones(2, 3), torch.ones(2, 3), torch.tensor(0.5), r"lam has the shape \(\): expected \(2,\)"),
    (torch.ones(2, 3), torch.ones(2, 4), torch.ones(2), r"\(2, 3\), with x_u, torch.float32 \(2, 4\): expected floats of one"),
    (torch.ones(2, 3).long(), torch.ones(2, 3).long(), torch.ones(2), r"torch.int64 \(2, 3\).*no mix-up \(lam=None\)")])
def test_what_cannot_be_blended_is_refused_by_a_sentence(x_l, x_u, lam, message):
    with pytest.raises(ValueError, match=message):
        cross_domain_mixup(x_l, torch.eye(5)[:2], x_u, torch.rand(len(x_u), 5), lam)


def test_losses_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    assert close(squared_error(logits, y), torch.tensor([0.5, 0.0], dtype=torch.float64))
    assert close(kl_divergence(logits, y), torch.tensor([2.0, 1.0], dtype=torch.float64).log())
    for loss in (squared_error, kl_divergence):
        with pytest.raises(ValueError, match=r"the shape \(2, 2\) and targets \(2,\): expected \(B, K\) twice"):
            loss(logits, torch.tensor([0, 1]))          # class indices, which would be broadcast


@pytest.mark.parametrize(("step", "rate"), [
    (0, 0.0), (1, 0.1 / 4000), (2000, 0.05), (3999, 0.1 * 3999 / 4000), (4000, 0.1), (300_000, 0.1), (300_001, 0.01),
    (350_000, 0.01), (350_001, 0.001), (400_000, 0.001)])
def test_learning_rate_of_the_paper(step, rate):
    assert learning_rate(step, 0.1, warmup=4000, milestones=[300_000, 350_000], gamma=0.1) == pytest.approx(rate, rel=1e-12)


def test_ramp_is_linear_then_constant_and_by_default_schedules_are_constant_and_the_weight_one():
    assert [ramp(step, 4, 2.0) for step in (0, 1, 3, 4, 5)] == [0.0, 0.5, 1.5, 2.0, 2.0]
    assert (ramp(1, 0, 2.0), ramp(1, 4), ramp(0, 0)) == (2.0, 0.25, 1.0)
    assert [learning_rate(step, 0.1) for step in (1, 7)] == [0.1, 0.1]
    assert learning_rate(3, 1.0, milestones=[1, 2]) == pytest.approx(0.01)


@pytest.mark.parametrize(("step", "rate"), [
    (0, 0.0), (1, 0.02), (9, 0.18), (10, 0.2), (11, 0.1 * (1 + math.cos(math.pi / 40))), (20, 0.1 * (1 + math.sqrt(0.5))),
    (30, 0.1), (40, 0.1 * (1 - math.sqrt(0.5))), (49, 0.1 * (1 - math.cos(math.pi / 40))), (50, 0.0)])
def test_the_cosine_falls_from_the_full_rate_after_the_warm_up_to_zero_at_the_last_step(step, rate):
    assert learning_rate(step, 0.2, warmup=10, milestones=[20], total_steps=50) == pytest.approx(rate, rel=1e-12, abs=1e-17)
