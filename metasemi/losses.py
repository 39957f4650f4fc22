"""The discrepancies Phi between a prediction and a target distribution."""
from collections.abc import Callable
from typing import NamedTuple

import torch


def kl_divergence(logits, y):
    """Phi^KL: KL(y || softmax(logits)), one value a sample.  logits, y: (B, K), rows of y on the simplex."""
    check_shapes(logits, y)
    return (torch.xlogy(y, y) - y * logits.log_softmax(dim=1)).sum(dim=1)


def squared_error(logits, y):
    """Phi^MSE: ||softmax(logits) - y||_2^2, one value a sample, in [0, 2].  logits, y: (B, K)."""
    check_shapes(logits, y)
    return (logits.softmax(dim=1) - y).square().sum(dim=1)


def check_shapes(logits, y):
    """Raises ValueError for targets, such as class indices, that would be broadcast."""
    if logits.dim() != 2 or logits.shape != y.shape:
        raise ValueError(f"logits have the shape {tuple(logits.shape)} and targets {tuple(y.shape)}: expected (B, K) twice")


class Consistency(NamedTuple):
    """A consistency loss, with what the meta-gradient is the derivative of.

    The minimum over the logits must be where their softmax is y.  All that the meta-gradient needs of the loss is its
    mixed second derivative there, and that is minus the Jacobian of `link` in the logits: for f(y) - f(p) - f'(p) (y - p),
    p the softmax, link is f'(p); for an f-divergence it is f''(1) log p.
    """
    loss: Callable          # logits (B, K), y (B, K) with rows on the simplex -> (B,)
    link: Callable          # logits (B, K) -> (B, K)
    inverse: Callable       # link(logits) -> softmax(logits), (B, K)


CONSISTENCY = {
    "mse": Consistency(squared_error, lambda logits: 2 * logits.softmax(dim=1), lambda linked: linked / 2),
    "kl": Consistency(kl_divergence, lambda logits: logits.log_softmax(dim=1), torch.exp),
}
