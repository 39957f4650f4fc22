"""One update of the weights: Algorithm 2, and the other three rows of the paper's ablation.

    meta  mix-up   classification loss L_cls                 consistency loss L_cons
    yes   yes      Phi^KL on mixed examples, y_hat           Phi(f(x_u), y_hat)           Algorithm 2
    yes   no       cross-entropy on labeled examples         Phi(f(x_u), y_hat)
    no    yes      Phi^KL on mixed examples, y_tilde         none
    no    no       cross-entropy on labeled examples         none                         the supervised baseline

The symbols are those of `metasemi.meta_gradient`.
"""
from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from metasemi.arguments import check_call, check_dense, check_logits
from metasemi.gradient import Average, evaluation_mode, logits, meta_gradient_with_telemetry
from metasemi.losses import CONSISTENCY, kl_divergence, labeled_loss, one_hot
from metasemi.pseudo_labels import cross_domain_mixup, update_pseudo_labels


class Step(NamedTuple):
    """What a step has done."""
    loss: Tensor                        # (), the loss that was minimized
    telemetry: dict[str, Tensor]        # name -> () tensor on the device of the model
    y_tilde: Tensor | None              # (B_u, K), pseudo-labels before the meta step, if the row has any
    y_hat: Tensor | None                # (B_u, K), and after it
    finite: Tensor                      # () bool, whether loss and gradient were; if not, the update was left out


def training_step(model: nn.Module, optimizer: Optimizer, x_l: Tensor, y_l: Tensor, x_u: Tensor | None = None, *,
                  x_u_strong: Tensor | None = None, alpha: float | None = None, beta: float | None = None, weight: float = 1.0,
                  lam: Tensor | Sequence[float] | None = None, meta: bool = True, method: str = "jvp", epsilon: float = 1e-2,
                  consistency: str = "mse", dtype: torch.dtype | None = None, average: Average | None = None) -> Step:
    """Makes one optimizer step; the model ends in training mode.  With a fused optimizer the host never waits for the device.

    An update whose loss or gradient is not finite is left out: weights and momenta stay as they are.  The statistics of
    batch normalization have seen the batch by then; where it held a NaN, they do not recover.

    Args:
        model, optimizer: the model maps (B, ...) to logits (B, K); the optimizer is any whose `step` needs no closure.
            Of the model's parameters it may have a part: only the gradients of its own are cleared and judged.
        x_l, y_l: (B_l, ...), of any type that the model takes, and (B_l,) int64.
        x_u: (B_u, ...); only the supervised baseline does without.
        x_u_strong: (B_u, ...), a second view of the examples in x_u, e.g. strongly augmented, which the consistency loss
            takes instead of x_u itself.
        alpha, beta, weight: learning rate, meta learning rate, weight of the consistency loss; floats, 0 or more.  beta is
            needed where meta is true.  Of several parameter groups the one that began with the largest rate gets alpha, and
            the others keep their ratio to it.  alpha=None leaves the rates to the optimizer and its scheduler.
        lam: (max(B_l, B_u),) mix-up weights, or None for no mix-up; `cross_domain_mixup` says what is blended with what.
        meta: whether pseudo-labels are improved by the meta-gradient and the consistency loss is used.
        method, epsilon, consistency, dtype: as in `meta_gradient`; with a dtype the training-mode passes run
            under autocast, and without one they do not, even inside autocast; weights and losses stay float32.
        average: as in `meta_gradient`; the update and `Step.loss` are then those of the whole batch, equal in every process,
            `finite` too.  The rest is that of this process.

    Raises:
        ValueError: for wrong shapes and numbers, before any weight has changed, and as `meta_gradient`.  A class outside
            0..K-1 or a lam outside [0, 1] that lies on an accelerator makes `finite` false instead.
    """
    check_step(model, optimizer, x_l, y_l, x_u, x_u_strong, alpha, beta, weight, lam, meta)
    y_tilde = y_hat = None
    telemetry: dict[str, Tensor] = {}
    if meta:
        y_tilde, gradient, logits_l, loss_l, g_norm = meta_gradient_with_telemetry(          # lines 3-7
            model, x_l, y_l, x_u, method, epsilon, consistency, dtype, average)
        y_hat = update_pseudo_labels(y_tilde, gradient, beta)                                # line 8
        telemetry = {"label-loss": loss_l, "label-acc": accuracy(logits_l, y_l),
                     "meta-shift": (y_hat - y_tilde).abs().mean(),
                     "meta-clipped": (y_tilde < beta * gradient).float().mean(), "meta-g-norm": g_norm}
    elif lam is not None:
        theta = dict(model.named_parameters())
        with evaluation_mode(model), torch.no_grad(), torch.autocast(x_l.device.type, enabled=False):
            y_tilde = y_hat = logits(model, theta, x_u, dtype).softmax(dim=1)                # line 3

    model.train()
    with torch.autocast(x_l.device.type, dtype=dtype, enabled=dtype is not None):
        # The order matters: both training-mode passes move the running statistics of batch normalization.
        if lam is not None:
            x_in, y_in = cross_domain_mixup(x_l, one_hot(y_l, y_hat), x_u, y_hat, lam)       # lines 10, 11
            logits_in = check_logits(model(x_in), x_in, "training")
        else:
            logits_in = check_logits(model(x_l), x_l, "training")
        logits_u = check_logits(model(x_u if x_u_strong is None else x_u_strong), x_u, "training") if meta else None
    if lam is not None:
        loss = kl_divergence(full_precision(logits_in), y_in).mean()                         # line 12
        telemetry["interp-loss"] = loss.detach()
    else:
        loss = labeled_loss(full_precision(logits_in), y_l)
        telemetry = {"label-loss": loss.detach(), "label-acc": accuracy(logits_in, y_l)} | telemetry
    if meta:
        loss_cons = CONSISTENCY[consistency].loss(full_precision(logits_u), y_hat).mean()    # line 13
        telemetry["unlabel-loss"] = loss_cons.detach()
        loss = loss + weight * loss_cons

    optimizer.zero_grad(set_to_none=True)
    loss.backward()                                                                          # line 14
    owned = {w: w.grad for group in optimizer.param_groups for w in group["params"] if w.grad is not None}
    check_dense({name: owned[w] for name, w in model.named_parameters() if w in owned})
    loss, gradients = loss.detach(), list(owned.values())
    if average:
        loss, *means = average([loss, *gradients])
        for d, mean in zip(gradients, means):
            d.copy_(mean)
    finite = loss.isfinite() & get_total_norm(gradients).isfinite()
    if alpha is not None:
        set_learning_rate(optimizer, alpha)
    update_if(finite, optimizer)                                                             # line 15
    return Step(loss, telemetry, y_tilde, y_hat, finite)


def check_step(model, optimizer, x_l, y_l, x_u, x_u_strong, alpha, beta, weight, lam, meta):
    """Raises ValueError for arguments of `training_step` that are wrong alone or together."""
    if x_u is None and (meta or lam is not None):
        raise ValueError("x_u is None: only the supervised baseline, meta=False and lam=None, needs no unlabeled examples")
    if x_u_strong is not None and not (meta and x_u_strong.shape[:1] == x_u.shape[:1]):
        raise ValueError(f"x_u_strong has the shape {tuple(x_u_strong.shape)}: expected a second view of each example of x_u "
                         "for the consistency loss, and meta=True")
    if meta and beta is None:
        raise ValueError("beta is missing: expected the meta learning rate, or meta=False for no meta step")
    for name, value in (("alpha", alpha), ("beta", beta), ("weight", weight)):
        if value is not None and not 0 <= value < inf:
            raise ValueError(f"{name} is {value}: expected a finite number, 0 or more")
    check_call(model, x_l, y_l, x_l if x_u is None else x_u)
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum") and group.get("dampening"):
            raise ValueError("a fused optimizer with dampening begins otherwise than one that is not fused: take fused=False")
        for w in group["params"] if group.get("fused") else []:
            if w.grad is None and torch.empty_like(w, device="meta").stride() != w.stride():
                raise ValueError(f"a weight of the shape {tuple(w.shape)} has gaps in memory, which a fused optimizer does not "
                                 "see: make it contiguous, or take fused=False")


def set_learning_rate(optimizer: Optimizer, alpha: float) -> None:
    """Makes alpha the largest rate of the parameter groups, in the ratios of the rates that each group began with."""
    groups = optimizer.param_groups
    rates = [group.setdefault("initial_lr", group["lr"]) for group in groups]           # a key of torch's schedulers, too
    for group, rate in zip(groups, rates):
        group["lr"] = alpha * (rate / max(rates) if any(rates) else 1.0)


def update_if(finite: Tensor, optimizer: Optimizer) -> None:
    """Calls `optimizer.step()` if finite, a () bool tensor, is true.  A fused optimizer decides that on the device; for another
    the host waits."""
    prepare_momenta(optimizer)
    if getattr(optimizer, "_step_supports_amp_scaling", False) and all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = (~finite).float()         # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf         # type: ignore[attr-defined]  # or it would hold back the steps of others
    elif finite:
        optimizer.step()


def prepare_momenta(optimizer: Optimizer) -> None:
    """Gives fused SGD momenta of zeros, laid out as their weights.

    Its own are uninitialized memory, which an update that is left out would not fill, and fail beside those of earlier steps.
    It reads weights and momenta by their places in memory: in another layout they would be silently mixed up.
    """
    for group in optimizer.param_groups:
        if not (group.get("fused") and group.get("momentum")):
            continue
        for w in group["params"]:
            momentum = optimizer.state.get(w, {}).get("momentum_buffer")
            if w.grad is not None and momentum is None:
                optimizer.state[w]["momentum_buffer"] = torch.zeros_like(w, memory_format=torch.preserve_format)
            elif momentum is not None and momentum.stride() != w.stride():
                optimizer.state[w]["momentum_buffer"] = torch.empty_like(w).copy_(momentum)


def accuracy(predictions: Tensor, y: Tensor) -> Tensor:
    """Returns the share of rows of predictions (B, K) whose largest entry is class y (B,)."""
    return (predictions.argmax(dim=1) == y).float().mean()


def full_precision(x: Tensor) -> Tensor:
    """Returns float32 for the half types, which losses are not computed in; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
