"""One update of the weights: Algorithm 2, and the other three rows of the paper's ablation.

    meta  mix-up   classification loss L_cls                 consistency loss L_cons
    yes   yes      Phi^KL on mixed examples, y_hat           Phi(f(x_u), y_hat)           Algorithm 2
    yes   no       cross-entropy on labeled examples         Phi(f(x_u), y_hat)
    no    yes      Phi^KL on mixed examples, y_tilde         none
    no    no       cross-entropy on labeled examples         none                         the supervised baseline

The symbols are those of `metasemi.meta_gradient`.
"""
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.utils import get_total_norm

from metasemi.losses import CONSISTENCY, kl_divergence
from metasemi.meta_gradient import check_batch, evaluation_mode, logits, meta_gradient_with_telemetry
from metasemi.pseudo_labels import cross_domain_mixup, update_pseudo_labels


class Step(NamedTuple):
    loss: torch.Tensor                  # (), the loss that was minimized
    telemetry: dict                     # name -> () tensor on the device of the model
    y_tilde: torch.Tensor | None        # (B_u, K), pseudo-labels before the meta step, if the row has any
    y_hat: torch.Tensor | None          # (B_u, K), and after it
    finite: torch.Tensor                # () bool, whether loss and gradient were; if not, the update was left out


def training_step(model, optimizer, x_l, y_l, x_u=None, *, x_u_strong=None, alpha=None, beta=0.0, weight=1.0, lam=None,
                  meta=True, method="jvp", epsilon=1e-2, consistency="mse", dtype=None, average=None):
    """One optimizer step; the model ends in training mode.  With a fused optimizer only the first waits for the device.

    An update whose loss or gradient is not finite is left out: weights and momenta stay as they are.  The statistics of
    batch normalization have seen the batch by then; where it held a NaN, they do not recover.

    Args:
        model, optimizer: of the same parameters.  The model maps (B, ...) to logits (B, K); the optimizer is any whose
            `step` needs no closure.
        x_l, y_l: (B_l, ...), of any type that the model takes, and (B_l,) int64.
        x_u: (B_u, ...); only the supervised baseline does without.
        x_u_strong: (B_u, ...), a second view of the examples in x_u, e.g. strongly augmented, which the consistency loss
            takes instead of x_u itself.
        alpha, beta, weight: learning rate, meta learning rate, weight of the consistency loss; floats.  Of several
            parameter groups the one that began with the largest rate gets alpha, and the others keep their ratio to it.
            alpha=None leaves the rates to the optimizer and its scheduler.
        lam: (max(B_l, B_u),) mix-up weights, or None for no mix-up; `cross_domain_mixup` says what is blended with what.
        meta: whether pseudo-labels are improved by the meta-gradient and the consistency loss is used.
        method, epsilon, consistency, dtype: as in `meta_gradient`; with a dtype the training-mode passes run
            under autocast, and without one they do not, even inside autocast; weights and losses stay float32.
        average: as in `meta_gradient`; the update and `Step.loss` are then those of the whole batch, equal in every process,
            `finite` too.  The rest is that of this process.

    Raises:
        ValueError: for wrong shapes, before any weight has changed, and as `meta_gradient`.
    """
    if x_u is None and (meta or lam is not None):
        raise ValueError("x_u is None: only the supervised baseline, meta=False and lam=None, needs no unlabeled examples")
    if x_u_strong is not None and not (meta and x_u_strong.shape[:1] == x_u.shape[:1]):
        raise ValueError(f"x_u_strong has the shape {tuple(x_u_strong.shape)}: expected a second view of each example of x_u "
                         "for the consistency loss, and meta=True")
    check_batch(x_l, y_l, x_l if x_u is None else x_u)
    y_tilde = y_hat = None
    telemetry = {}
    if meta:
        y_tilde, gradient, logits_l, g_norm = meta_gradient_with_telemetry(                  # lines 3-7
            model, x_l, y_l, x_u, method, epsilon, consistency, dtype, average)
        y_hat = update_pseudo_labels(y_tilde, gradient, beta)                                # line 8
        telemetry = {"label-loss": cross_entropy(logits_l, y_l), "label-acc": accuracy(logits_l, y_l),
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
            y_l_one_hot = one_hot(y_l, y_hat.shape[1]).to(y_hat.dtype)
            x_in, y_in = cross_domain_mixup(x_l, y_l_one_hot, x_u, y_hat, lam)               # lines 10, 11
            logits_in = model(x_in)
        else:
            logits_in = model(x_l)
        logits_u = model(x_u if x_u_strong is None else x_u_strong) if meta else None
    if lam is not None:
        loss = kl_divergence(full_precision(logits_in), y_in).mean()                         # line 12
        telemetry["interp-loss"] = loss.detach()
    else:
        loss = cross_entropy(full_precision(logits_in), y_l)
        telemetry = {"label-loss": loss.detach(), "label-acc": accuracy(logits_in, y_l)} | telemetry
    if meta:
        loss_cons = CONSISTENCY[consistency].loss(full_precision(logits_u), y_hat).mean()    # line 13
        telemetry["unlabel-loss"] = loss_cons.detach()
        loss = loss + weight * loss_cons

    optimizer.zero_grad(set_to_none=True)
    loss.backward()                                                                          # line 14
    loss, gradients = loss.detach(), [w.grad for w in model.parameters() if w.grad is not None]
    if average:
        loss, *means = average([loss, *gradients])
        for d, mean in zip(gradients, means):
            d.copy_(mean)
    finite = loss.isfinite() & get_total_norm(gradients).isfinite()
    if alpha is not None:
        set_learning_rate(optimizer, alpha)
    update_if(finite, optimizer)                                                             # line 15
    return Step(loss, telemetry, y_tilde, y_hat, finite)


def set_learning_rate(optimizer, alpha):
    """Makes alpha the largest rate of the parameter groups, in the ratios that they had at the first call."""
    groups = optimizer.param_groups
    ratios = [1.0]
    if len(groups) > 1:
        rates = [group.setdefault("initial_lr", group["lr"]) for group in groups]       # a key of torch's schedulers, too
        ratios = [rate / max(rates) if any(rates) else 1.0 for rate in rates]
    for group, ratio in zip(groups, ratios):
        group["lr"] = alpha * ratio


def update_if(finite, optimizer):
    """`optimizer.step()` if finite, a () bool tensor, is true.  A fused optimizer decides that on the device; for another
    the host waits."""
    if optimizer.defaults.get("fused") and not lacks_momenta(optimizer):
        optimizer.found_inf = (~finite).float()
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf         # or it would hold back the steps of others
    elif finite:
        optimizer.step()


def lacks_momenta(optimizer):
    """Whether a weight has a gradient and no momentum yet: torch's fused SGD makes one of uninitialized memory, which an
    update that is left out would not fill."""
    return any(w.grad is not None and optimizer.state.get(w, {}).get("momentum_buffer") is None
               for group in optimizer.param_groups if group.get("momentum") for w in group["params"])


def accuracy(predictions, y):
    """Share of rows of predictions (B, K) whose largest entry is class y (B,)."""
    return (predictions.argmax(dim=1) == y).float().mean()


def full_precision(x):
    """float32 for the half types, which losses are not computed in; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
