"""What is done with the meta-gradient: the meta step on the pseudo-labels, and cross-domain mix-up."""


def update_pseudo_labels(y_tilde, gradient, beta):
    """One meta step (eq. 6, line 8), then back to the simplex: clipped at zero, rows divided by their sum.

    y_tilde, gradient: (B, K); beta >= 0.  Returns y_hat (B, K).
    """
    y_hat = (y_tilde - beta * gradient).clamp_min(0)
    return y_hat / y_hat.sum(dim=1, keepdim=True)


def cross_domain_mixup(x_l, y_l_one_hot, x_u, y_hat, lam):
    """Blends each labeled image with an unlabeled one, and their targets alike (lines 10, 11).

    x_l, x_u: (B, C, H, W); y_l_one_hot, y_hat: (B, K); lam: (B,) in [0, 1], the share of the labeled image.
    Returns x_in (B, C, H, W) and y_in (B, K).
    """
    lam_x, lam_y = lam.view(-1, 1, 1, 1), lam.view(-1, 1)
    return lam_x * x_l + (1 - lam_x) * x_u, lam_y * y_l_one_hot + (1 - lam_y) * y_hat
