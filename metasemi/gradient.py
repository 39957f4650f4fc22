"""The meta-gradient: how the labeled loss answers to the pseudo-labels, through a virtual SGD step.

    theta    model parameters             x_l, y_l  labeled examples, class indices
    y_tilde  pseudo-labels at theta       x_u       unlabeled examples
    y_hat    improved pseudo-labels       B, K      batch size, classes
    alpha    step size                    beta      meta step size
    g        gradient of the mean labeled loss at theta
    J        Jacobian of softmax(model(x_u)) with respect to theta
    Phi      squared error ("mse") or Kullback-Leibler divergence ("kl")
    lam      mix-up weights ~ Beta(gamma, gamma)

"Line n" refers to Algorithm 2 of the paper, "eq. n" to the numbering of the authors' slides.

Why the virtual step is zero and the meta-gradient is not
---------------------------------------------------------
Pseudo-labels start at the model's own predictions (eq. 2).  There the consistency loss is at its minimum, its
gradient g_u (eq. 3) is exactly zero, and the virtual step theta~ = theta - alpha g_u (eq. 4) stays where it is.
But move one pseudo-label and that minimum moves, so g_u leaves zero: its derivative with respect to y_tilde is
-2 J / B_u for "mse".  The chain rule through eq. 4 therefore gives (eqs. 12-14)

    grad y_tilde = (2 alpha / B_u) J g            "mse"
    grad y_tilde = (  alpha / B_u) J_log g        "kl", J_log the Jacobian of log softmax

one Jacobian-vector product: the speed of each prediction on x_u as theta moves along the labeled gradient.
Stepping against it, y_hat = y_tilde - beta grad, is to first order the prediction after a labeled SGD step of
size 2 beta.  As in Algorithm 2 the factor alpha / B_u is left to beta; the factor 2 is kept.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from metasemi.arguments import check_call, check_dense, check_logits
from metasemi.losses import CONSISTENCY, labeled_loss

Average = Callable[[list[Tensor]], list[Tensor]]


def meta_gradient(model: nn.Module, x_l: Tensor, y_l: Tensor, x_u: Tensor, method: str = "jvp", epsilon: float = 1e-2,
                  consistency: str = "mse", dtype: torch.dtype | None = None,
                  average: Average | None = None) -> tuple[Tensor, Tensor]:
    """Returns pseudo-labels of x_u and the gradient of the labeled loss with respect to them, alpha / B_u left out.

    Everything is evaluated in evaluation mode: dropout and batch statistics would make theta and its neighbors
    different functions.  The model is read, never written: parameters, buffers, `.grad`, training flags and random
    number generators are afterwards what they were, bit for bit, unless the model itself changes them in evaluation mode
    or in `train`.  Whether a method is right for a network of your own, `check_model` says.

    Two threads must not call at once: evaluation mode belongs to the model, and the attention kernels to all of torch.

    Args:
        model: maps (B, ...) to logits (B, K).  It may be compiled; "jvp" and "unrolled" then run the original where
            compiled code has no derivative.  Activation checkpointing needs use_reentrant=False, no dtype and,
            in torch 2.11, another method than "jvp".
        x_l, y_l: (B_l, ...), of any type that the model takes, and (B_l,) int64 class indices.
        x_u: (B_u, ...).
        method: "jvp", forward-mode differentiation, exact, in one pass; "finite-difference", the central
            difference of the paper (eqs. 15, 16), also for operations without a forward-mode derivative; "unrolled",
            double backward through the virtual step (eqs. 2-5).
        epsilon: the length in parameter space of each half-step of the finite difference, between the machine precision
            of the weights' type and its inverse.  With a half dtype that is often less than the resolution of the weights,
            and the difference mostly rounding.
        consistency: "mse" or "kl", the Phi of the consistency loss, or another key of `metasemi.losses.CONSISTENCY`.
        dtype: computing type of the network, e.g. torch.bfloat16; default: that of the parameters, also inside autocast.
        average: where x_l and x_u are one of several equal parts of a batch, each with a process: a function from a list of
            tensors to the list of their means over the processes.  g is then that of the whole batch.

    Returns:
        y_tilde: (B_u, K), softmax predictions.
        gradient: (B_u, K), 2 J g for "mse" (rows sum to zero), J_log g for "kl".  Zero where g is zero.

    Raises:
        ValueError: for an unknown method or consistency, a wrong shape, a class outside 0..K-1 (on an accelerator the
            gradient is not finite instead), an epsilon out of range, logits that depend on no parameter, a sparse gradient,
            DataParallel, and inside inference_mode or parametrize.cached.
    """
    y_tilde, gradient, *_ = meta_gradient_with_telemetry(model, x_l, y_l, x_u, method, epsilon, consistency, dtype, average)
    return y_tilde, gradient


def meta_gradient_with_telemetry(model, x_l, y_l, x_u, method, epsilon, consistency, dtype, average):
    """Returns what `meta_gradient` does, then the labeled logits (B_l, K), their mean loss, (), and ||g||, ()."""
    check_options(model, method, epsilon, consistency)
    check_call(model, x_l, y_l, x_u)
    with (evaluation_mode(model), differentiable_attention(), torch.enable_grad(),
          torch.autocast(x_l.device.type, enabled=False)):      # under it, forward-mode differentiation fails
        theta = {k: w for k, w in model.named_parameters() if w.requires_grad}
        if not theta:
            raise ValueError("no parameter of the model requires a gradient, so nothing answers to the pseudo-labels")
        f = partial(logits, model, dtype=dtype)
        result = METHODS[method](f, theta, x_l, y_l, x_u, CONSISTENCY[consistency], average or list, epsilon)
    return tuple(tensor.detach() for tensor in result)


def check_options(model: nn.Module, method: str, epsilon: float, consistency: str) -> None:
    """Raises ValueError for a name that there is not, and for a half-step that the weights cannot make, or after which they
    would be nothing else."""
    for what, name, known in (("method", method, METHODS), ("consistency", consistency, CONSISTENCY)):
        if name not in known:
            raise ValueError(f"no {what} is named {name!r}; choose from {', '.join(known)}")
    dtype = next((w.dtype for w in model.parameters() if w.requires_grad), torch.float32)
    unit = torch.finfo(dtype).eps
    if not unit <= epsilon <= 1 / unit:
        raise ValueError(f"epsilon is {epsilon}: expected a length between {unit:.2g} and {1 / unit:.2g}, since the weights "
                         f"are {dtype}")


# The three methods.  f(theta, x) are logits; each returns y_tilde, the gradient, and what `labeled_gradient` has beside g.

def by_jvp(f, theta, x_l, y_l, x_u, consistency, average, epsilon):
    """Differentiates the predictions along g, exactly, in forward mode."""
    g, *labeled = labeled_gradient(f, theta, x_l, y_l, average)                             # lines 4, 5
    # Compiled code has no forward-mode derivative, and some versions of torch drop it silently.
    # Dual numbers w + g dt, rather than torch.func.jvp: bit for bit the same, without its cost per operation.
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), forward_ad.dual_level():
        dual = {k: forward_ad.make_dual(w.detach(), g[k]) for k, w in theta.items()}
        linked, gradient = forward_ad.unpack_dual(consistency.link(f(dual, x_u)))           # line 7
        if gradient is None:
            raise ValueError(UNREACHED.format("predictions on x_u depend"))
        return consistency.inverse(linked), gradient, *labeled                              # line 3


def by_finite_difference(f, theta, x_l, y_l, x_u, consistency, average, epsilon):
    """Differentiates the predictions along g by the central difference of the paper (eqs. 15, 16)."""
    g, logits_l, loss_l, g_norm = labeled_gradient(f, theta, x_l, y_l, average)             # lines 4, 5
    theta = {k: w.detach() for k, w in theta.items()}
    half_step = epsilon / g_norm.clamp_min(torch.finfo(g_norm.dtype).tiny)                  # line 6; g = 0 moves nothing

    def at(sign):
        # Moved copies: adding epsilon g in place and taking it off again changes half of all float32 weights.
        moved = {k: w + sign * half_step * g[k] for k, w in theta.items()}
        return consistency.link(f(moved, x_u))

    y_tilde = f(theta, x_u).softmax(dim=1)                                                  # line 3
    difference = (at(+1) - at(-1)) / 2                                                      # line 7
    return y_tilde, difference * (g_norm / epsilon), logits_l, loss_l, g_norm


def by_unrolling(f, theta, x_l, y_l, x_u, consistency, average, epsilon):
    """Differentiates the labeled loss twice, backward through the virtual step (eqs. 2-5)."""
    with torch.compiler.set_stance("force_eager"):          # compiled code has no second derivative
        logits_u = f(theta, x_u)
        y_tilde = logits_u.softmax(dim=1).detach().requires_grad_()                         # eq. 2
        loss_u = consistency.loss(logits_u, y_tilde).mean()
        g_u = gradient_of(loss_u, theta, create_graph=True)                                 # eq. 3
        virtual = {k: w - g_u[k] for k, w in theta.items()}                                 # eq. 4 with alpha = 1
        g, *labeled = labeled_gradient(f, virtual, x_l, y_l, average)
        gradient, = torch.autograd.grad(list(virtual.values()), y_tilde, list(g.values()))  # eq. 5
        return y_tilde, len(x_u) * gradient, *labeled


METHODS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "jvp": by_jvp, "finite-difference": by_finite_difference, "unrolled": by_unrolling}
UNREACHED = ("the {} on no parameter of the model that requires a gradient: reach its weights by their registered names alone, "
             "and outside of torch.no_grad() and detach()")


def labeled_gradient(f, theta, x_l, y_l, average):
    """Returns g by the names of theta, then the labeled logits, their mean loss, and ||g||."""
    logits_l = f(theta, x_l)
    loss_l = labeled_loss(logits_l, y_l)
    g = gradient_of(loss_l, theta)
    g = dict(zip(g, average(list(g.values()))))
    return g, logits_l, loss_l, get_total_norm(list(g.values()))


def gradient_of(loss, theta, create_graph=False):
    """Returns the gradient of a loss by the names of theta, zero for what the loss does not depend on.

    Raises ValueError if that is everything, and for a sparse gradient.
    """
    found = []
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(theta.values()), create_graph=create_graph, allow_unused=True)
    if all(d is None for d in found):
        raise ValueError(UNREACHED.format("loss depends"))
    g = {k: torch.zeros_like(w) if d is None else d for (k, w), d in zip(theta.items(), found)}
    check_dense(g)
    return g


def logits(model, theta, x, dtype):
    """Returns the logits at the parameters theta; with a dtype, from copies of the whole network in it, as float32.

    Explicit copies rather than autocast, which has no forward-mode derivative.
    """
    # Parameters and buffers: a shared tensor under a name in each module that has it, each module under one name.
    state = {k: v for prefix, module in model.named_modules() for named in (module.named_parameters, module.named_buffers)
             for k, v in named(prefix, recurse=False, remove_duplicate=False)}
    values = {w: theta[k] for k, w in state.items() if k in theta}
    if dtype is not None:
        values = {v: values.get(v, v).to(dtype) for v in state.values() if v.is_floating_point()}
        x = x.to(dtype) if x.is_floating_point() else x
    # tie_weights=True would give a module with two names its values twice, and put copies back in place of parameters.
    y = functional_call(model, {k: values[v] for k, v in state.items() if v in values}, (x,), tie_weights=False)
    check_logits(y, x, "evaluation")
    return y if dtype is None else y.float()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode, and afterwards every module back to what it was, each time by calling `train`, which a
    module may have overridden."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        if any(training for _, training in modes):
            model.eval()
        yield
    finally:
        for module, training in modes:              # parents first, as torch does
            if module.training != training:
                module.train(training)
        for module, training in modes:
            module.training = training              # a module with two parents, or whose own `train` leaves it as it is


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Computes attention by its formula inside: the fused kernels have no forward-mode and no second derivative."""
    mha = torch.backends.mha
    enabled = mha.get_fastpath_enabled()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            mha.set_fastpath_enabled(False)
            yield
    finally:
        mha.set_fastpath_enabled(enabled)
