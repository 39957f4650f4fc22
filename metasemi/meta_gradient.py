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
import sys
from contextlib import contextmanager
from functools import partial
from inspect import signature
from types import ModuleType

import torch
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.nn.utils import get_total_norm

from metasemi.losses import CONSISTENCY, Consistency


def meta_gradient(model, x_l, y_l, x_u, method="jvp", epsilon=1e-2, consistency="mse", dtype=None, average=None):
    """Pseudo-labels of x_u and the gradient of the labeled loss with respect to them, alpha / B_u left out.

    Everything is evaluated in evaluation mode: dropout and batch statistics would make theta and its neighbors
    different functions.  The model is read, never written: parameters, buffers, `.grad`, training flags and random
    number generators are afterwards what they were, bit for bit, unless the model itself changes them in evaluation mode.

    Args:
        model: maps (B, ...) to logits (B, K).  It may be compiled; "jvp" and "unrolled" then run the original where
            compiled code has no derivative.  Activation checkpointing needs use_reentrant=False, no dtype and,
            in torch 2.11, another method than "jvp".
        x_l, y_l: (B_l, ...), of any type that the model takes, and (B_l,) int64 class indices.
        x_u: (B_u, ...).
        method: "jvp", forward-mode differentiation, exact and the cheapest; "finite-difference", the central
            difference of the paper (eqs. 15, 16), also for operations without a forward-mode derivative; "unrolled",
            double backward through the virtual step (eqs. 2-5); or what `compiled_jvp` returns.
        epsilon: > 0, the length in parameter space of each half-step of the finite difference.  In a half type that is
            often less than the resolution of the weights, and the difference mostly rounding.
        consistency: "mse" or "kl", the Phi of the consistency loss, or another key of `metasemi.losses.CONSISTENCY`.
        dtype: computing type of the network, e.g. torch.bfloat16; default: that of the parameters, also inside autocast.
        average: where x_l and x_u are one of several equal parts of a batch, each with a process: a function from a list of
            tensors to the list of their means over the processes.  g is then that of the whole batch.

    Returns:
        y_tilde: (B_u, K), softmax predictions.
        gradient: (B_u, K), 2 J g for "mse" (rows sum to zero), J_log g for "kl".  Zero where g is zero.

    Raises:
        ValueError: for an unknown method or consistency, a consistency that is not a `Consistency`, a wrong shape, an
            epsilon that is not above 0, or a model without a parameter that requires a gradient.
    """
    return meta_gradient_with_telemetry(model, x_l, y_l, x_u, method, epsilon, consistency, dtype, average)[:2]


def meta_gradient_with_telemetry(model, x_l, y_l, x_u, method="jvp", epsilon=1e-2, consistency="mse", dtype=None,
                                 average=None):
    """As `meta_gradient`, with what it meets on its way: the labeled logits (B_l, K), and ||g||, ()."""
    if method not in METHODS and not callable(method):
        raise ValueError(f"no method is named {method!r}; choose from {', '.join(METHODS)}")
    if consistency not in CONSISTENCY:
        raise ValueError(f"no consistency is named {consistency!r}; choose from {', '.join(CONSISTENCY)}")
    if not isinstance(CONSISTENCY[consistency], Consistency):
        raise ValueError(f"the consistency {consistency!r} is a loss without its derivative: register a Consistency")
    check_batch(x_l, y_l, x_u)
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}: expected a length above 0")
    theta = {k: w for k, w in model.named_parameters() if w.requires_grad}
    if not theta:
        raise ValueError("no parameter of the model requires a gradient, so nothing answers to the pseudo-labels")
    with (evaluation_mode(model), differentiable_attention(), torch.enable_grad(),
          torch.autocast(x_l.device.type, enabled=False)):      # under it, forward-mode differentiation fails
        result = METHODS.get(method, method)(model, theta, x_l, y_l, x_u, epsilon, CONSISTENCY[consistency], dtype, average)
    return tuple(tensor.detach() for tensor in result)


def check_batch(x_l, y_l, x_u):
    for name, x in (("x_l", x_l), ("x_u", x_u)):
        if x.dim() == 0 or len(x) == 0:
            raise ValueError(f"{name} has the shape {tuple(x.shape)}: expected (B, ...) with at least one example")
    if y_l.shape != x_l.shape[:1] or y_l.dtype != torch.int64:
        raise ValueError(f"y_l is {y_l.dtype} of the shape {tuple(y_l.shape)}: expected the class index of each example of "
                         f"x_l, torch.int64 of the shape ({len(x_l)},)")


@contextmanager
def without_compiled_code():
    """Inside, compiled models run their original: compiled code has no forward-mode derivative, which some versions of torch
    drop silently, and no second one."""
    with torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
def by_jvp(model, theta, g, g_norm, x_u, epsilon, consistency, dtype):
    # Dual numbers w + g dt, rather than torch.func.jvp: bit for bit the same, without its cost per operation.
    with forward_ad.dual_level():
        dual = {k: forward_ad.make_dual(w, g[k]) for k, w in theta.items()}
        logits_u = logits(model, dual, x_u, dtype)
        linked, gradient = forward_ad.unpack_dual(consistency.link(logits_u))           # line 7
        return consistency.inverse(linked), gradient                                    # line 3


def by_finite_difference(model, theta, g, g_norm, x_u, epsilon, consistency, dtype):
    half_step = epsilon / g_norm.clamp_min(torch.finfo(g_norm.dtype).tiny)          # line 6; g = 0 moves nothing

    def at(sign):
        # Moved copies: adding epsilon g in place and taking it off again changes half of all float32 weights.
        moved = {k: w + sign * half_step * g[k] for k, w in theta.items()}
        return consistency.link(logits(model, moved, x_u, dtype))

    y_tilde = logits(model, theta, x_u, dtype).softmax(dim=1)                       # line 3
    difference = (at(+1) - at(-1)) / 2                                              # line 7
    return y_tilde, difference * (g_norm / epsilon)


def along_g(derivative, model, theta, x_l, y_l, x_u, epsilon, consistency, dtype, average):
    """A method that takes a derivative of the predictions along g, `by_jvp` or `by_finite_difference`."""
    logits_l = logits(model, theta, x_l, dtype)                                         # line 4
    g = torch.autograd.grad(cross_entropy(logits_l, y_l), list(theta.values()), materialize_grads=True)     # line 5
    g = average(g) if average else g
    theta = {k: w.detach() for k, w in theta.items()}
    g_norm = get_total_norm(g)
    y_tilde, gradient = derivative(model, theta, dict(zip(theta, g)), g_norm, x_u, epsilon, consistency, dtype)
    return y_tilde, gradient, logits_l, g_norm


@without_compiled_code()
def by_unrolling(model, theta, x_l, y_l, x_u, epsilon, consistency, dtype, average):
    logits_u = logits(model, theta, x_u, dtype)
    y_tilde = logits_u.softmax(dim=1).detach().requires_grad_()                     # eq. 2
    loss_u = consistency.loss(logits_u, y_tilde).mean()
    g_u = torch.autograd.grad(loss_u, list(theta.values()), create_graph=True, materialize_grads=True)   # eq. 3
    virtual = {k: w - d for (k, w), d in zip(theta.items(), g_u)}                   # eq. 4 with alpha = 1
    logits_l = logits(model, virtual, x_l, dtype)
    loss_l = cross_entropy(logits_l, y_l)
    g = torch.autograd.grad(loss_l, list(virtual.values()), retain_graph=True, materialize_grads=True)
    g = average(g) if average else g
    gradient, = torch.autograd.grad(list(virtual.values()), y_tilde, g)             # eq. 5
    return y_tilde, len(x_u) * gradient, logits_l, get_total_norm(g)


METHODS = {"jvp": partial(along_g, without_compiled_code()(by_jvp)),
           "finite-difference": partial(along_g, by_finite_difference), "unrolled": by_unrolling}


def compiled_jvp():
    """A method that is "jvp" with its derivative compiled: equal up to rounding."""
    return partial(along_g, torch.compile(by_jvp, fullgraph=True))


def logits(model, theta, x, dtype):
    """Logits at the parameters theta; with a dtype, from copies of the whole network in it, as float32.

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
    if not isinstance(y, torch.Tensor) or y.shape[:-1] != x.shape[:1]:
        got = f"the shape {tuple(y.shape)}" if isinstance(y, torch.Tensor) else f"a {type(y).__name__}"
        raise ValueError(f"the model gives {got} for {len(x)} examples: expected logits of the shape ({len(x)}, K)")
    return y if dtype is None else y.float()


@contextmanager
def evaluation_mode(model):
    """Puts every module in evaluation mode, and afterwards each back to what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def differentiable_attention():
    """Attention by its formula, since the fused kernels have no forward-mode and no second derivative; afterwards as before."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


class CallableModule(ModuleType):
    """By its name `metasemi.meta_gradient` is this module and the package's function: a module that can be called is both."""
    __call__ = staticmethod(meta_gradient)
    __signature__ = signature(meta_gradient)


sys.modules[__name__].__class__ = CallableModule
