"""The discrepancies Phi between a prediction and a target distribution, and the loss of the labeled examples."""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from metasemi.arguments import check_classes


def kl_divergence(logits: Tensor, y: Tensor) -> Tensor:
    """Returns Phi^KL, KL(y || softmax(logits)), one value a sample.  logits, y: (B, K), rows of y on the simplex."""
    check_shapes(logits, y)
    return (torch.xlogy(y, y) - y * logits.log_softmax(dim=1)).sum(dim=1)


def squared_error(logits: Tensor, y: Tensor) -> Tensor:
    """Returns Phi^MSE, ||softmax(logits) - y||_2^2, one value a sample, in [0, 2].  logits, y: (B, K)."""
    check_shapes(logits, y)
    return (logits.softmax(dim=1) - y).square().sum(dim=1)


def check_shapes(logits: Tensor, y: Tensor) -> None:
    """Raises ValueError for targets, such as class indices, that would be broadcast."""
    if logits.dim() != 2 or logits.shape != y.shape:
        raise ValueError(f"logits have the shape {tuple(logits.shape)} and targets {tuple(y.shape)}: expected (B, K) twice")


class Consistency(NamedTuple):
    """A consistency loss, with what the meta-gradient is the derivative of.

    The minimum over the logits must be where their softmax is y.  All that the meta-gradient needs of the loss is its
    mixed second derivative there, and that is minus the Jacobian of `link` in the logits: for f(y) - f(p) - f'(p) (y - p),
    p the softmax, link is f'(p); for an f-divergence it is f''(1) log p.
    """
    loss: Callable[[Tensor, Tensor], Tensor]    # logits (B, K), y (B, K) with rows on the simplex -> (B,)
    link: Callable[[Tensor], Tensor]            # logits (B, K) -> (B, K)
    inverse: Callable[[Tensor], Tensor]         # link(logits) -> softmax(logits), (B, K)


CONSISTENCY: dict[str, Consistency] = {
    "mse": Consistency(squared_error, lambda logits: 2 * logits.softmax(dim=1), lambda linked: linked / 2),
    "kl": Consistency(kl_divergence, lambda logits: logits.log_softmax(dim=1), torch.exp),
}


def labeled_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the mean cross-entropy of logits (B, K) and classes y (B,).

    A class outside 0..K-1 raises ValueError on the CPU.  An accelerator's answer would have to be waited for: there the loss
    and its gradient are not finite instead.
    """
    check_classes(y, logits.shape[1])
    inside = y.clamp(0, logits.shape[1] - 1)            # a class outside would end a CUDA process
    return cross_entropy(logits, inside) / (inside == y).all()


def one_hot(y: Tensor, y_hat: Tensor) -> Tensor:
    """Returns rows of the simplex for classes y (B,), in the type and number of classes of y_hat (B_u, K).

    A class outside 0..K-1 raises ValueError on the CPU, and is a row of NaN elsewhere.
    """
    check_classes(y, y_hat.shape[1])
    rows = (y.unsqueeze(1) == torch.arange(y_hat.shape[1], device=y.device)).to(y_hat.dtype)
    return rows / rows.sum(dim=1, keepdim=True)
