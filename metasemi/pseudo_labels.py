"""What is done with the meta-gradient: the meta step on the pseudo-labels, and cross-domain mix-up."""
from collections.abc import Sequence

import torch
from torch import Tensor

from metasemi.arguments import check_shares


def update_pseudo_labels(y_tilde: Tensor, gradient: Tensor, beta: float) -> Tensor:
    """Makes one meta step (eq. 6, line 8), then returns to the simplex: clipped at zero, rows divided by their sum.

    y_tilde, gradient: (B, K); beta >= 0.  Returns y_hat (B, K).
    """
    y_hat = (y_tilde - beta * gradient).clamp_min(0)
    return y_hat / y_hat.sum(dim=1, keepdim=True)


def cross_domain_mixup(x_l: Tensor, y_l_one_hot: Tensor, x_u: Tensor, y_hat: Tensor,
                       lam: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
    """Blends each labeled example with an unlabeled one, and their targets alike (lines 10, 11).

    Pair i is the labeled example i mod B_l and the unlabeled example i mod B_u, for i < B = max(B_l, B_u): if one of the
    batches is smaller, it is repeated.

    x_l, x_u: (B_l, ...) and (B_u, ...) float; y_l_one_hot, y_hat: (B_l, K) and (B_u, K); lam: (B,) in [0, 1], the share of
    the labeled example; it takes the type of x_l.  Returns x_in (B, ...) and y_in (B, K).  Raises ValueError for what cannot
    be blended; a lam outside [0, 1] on an accelerator, where looking would wait, gives targets that are not finite instead.
    """
    pairs = max(len(x_l), len(x_u))
    if x_l.shape[1:] != x_u.shape[1:] or not (x_l.is_floating_point() and x_u.is_floating_point()):
        raise ValueError(f"mix-up cannot blend x_l, {x_l.dtype} {tuple(x_l.shape)}, with x_u, {x_u.dtype} {tuple(x_u.shape)}: "
                         "expected floats of one shape, or no mix-up (lam=None)")
    lam = torch.as_tensor(lam, dtype=x_l.dtype)
    if lam.shape != (pairs,):
        raise ValueError(f"lam has the shape {tuple(lam.shape)}: expected ({pairs},), since {len(x_l)} labeled and {len(x_u)} "
                         f"unlabeled examples make {pairs} pairs")
    check_shares(lam)
    y_hat = y_hat / (lam.clamp(0, 1) == lam).all()              # inf or NaN if one is outside, on an accelerator
    lam = lam.to(x_l.device)
    x_l, y_l_one_hot, x_u, y_hat = (repeated(t, pairs) for t in (x_l, y_l_one_hot, x_u, y_hat))
    lam_x, lam_y = lam.view(-1, *[1] * (x_l.dim() - 1)), lam.view(-1, 1)
    return lam_x * x_l + (1 - lam_x) * x_u, lam_y * y_l_one_hot + (1 - lam_y) * y_hat


def repeated(t: Tensor, length: int) -> Tensor:
    """Returns the rows of t from the first on, and again, until there are `length`."""
    return t if len(t) == length else t[torch.arange(length, device=t.device) % len(t)]
