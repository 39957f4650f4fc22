"""The two discrepancies Phi between a prediction and a target distribution."""
import torch


def kl_divergence(logits, y):
    """Phi^KL: KL(y || softmax(logits)), one value a sample.  logits, y: (B, K), rows of y on the simplex."""
    return (torch.xlogy(y, y) - y * logits.log_softmax(dim=1)).sum(dim=1)


def squared_error(logits, y):
    """Phi^MSE: ||softmax(logits) - y||_2^2, one value a sample, in [0, 2].  logits, y: (B, K)."""
    return (logits.softmax(dim=1) - y).square().sum(dim=1)


CONSISTENCY = {"mse": squared_error, "kl": kl_divergence}
