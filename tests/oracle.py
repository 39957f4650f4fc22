"""The meta-gradient by another road: eqs. 2-5 taken literally, double backward through the virtual step."""
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.checkpoint import checkpoint


def double_backward(model, x_l, y_l, x_u, *, consistency="mse", alpha=0.1):
    """(y_tilde, the derivative of the labeled loss after the virtual step).

    consistency: "mse", "kl", or a function of probabilities p, y (B, K) that gives (B,).
    """
    theta = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        p_u = model(x_u).softmax(dim=1)
        y_tilde = p_u.detach().requires_grad_()
        if consistency == "mse":
            loss_u = (p_u - y_tilde).square().sum(dim=1).mean()
        elif consistency == "kl":
            loss_u = kl_div(p_u.log(), y_tilde, reduction="batchmean")
        else:
            loss_u = consistency(p_u, y_tilde).mean()
        g_u = torch.autograd.grad(loss_u, theta, create_graph=True, materialize_grads=True)
        virtual = {w: w - alpha * d for w, d in zip(theta, g_u)}
        loss_l = cross_entropy(call(model, virtual, x_l), y_l)
        return y_tilde.detach(), torch.autograd.grad(loss_l, y_tilde)[0]


def call(model, values, x):
    """model(x) with values[w] in place of each parameter w, put in and taken out again by hand."""
    places = [(module._parameters, name, w) for module in model.modules() for name, w in module._parameters.items()
              if w in values]
    try:
        for parameters, name, w in places:
            parameters[name] = values[w]
        return model(x)
    finally:
        for parameters, name, w in places:
            parameters[name] = w


def exact_gradient(model, x_l, y_l, x_u, *, consistency="mse", alpha=0.1):
    """(y_tilde, the gradient with alpha / B_u taken out), as `meta_gradient` defines them."""
    y_tilde, gradient = double_backward(model, x_l, y_l, x_u, consistency=consistency, alpha=alpha)
    return y_tilde, gradient * len(x_u) / alpha


def close(value, expected, units=100):
    """Whether two computations of one tensor agree up to rounding: no entry differs by more than `units` in the last place of
    the largest entry, in the coarser of the two types.  What is not a floating-point number must be equal."""
    if not expected.is_floating_point():
        return torch.equal(value, expected)
    unit = max(torch.finfo(t.dtype).eps for t in (value, expected)) * expected.abs().max()
    return value.shape == expected.shape and bool((value - expected).abs().max() <= units * unit)


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


def smooth_network(num_classes=5):
    """A tiny network without kinks, so that orders of convergence can be seen."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.Tanh(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, num_classes)).double()


class Checkpointed(nn.Module):
    """Two parts of a network, the second of which keeps no activations."""

    def __init__(self, first, rest, use_reentrant=False):
        super().__init__()
        self.first, self.rest, self.use_reentrant = first, rest, use_reentrant

    def forward(self, x):
        return checkpoint(self.rest, self.first(x), use_reentrant=self.use_reentrant)


def random_case(size=8, labeled=4, unlabeled=6, num_classes=5, seed=0):
    """x_l, y_l, x_u in float64, with more unlabeled images than labeled ones so that a mixed-up batch size shows."""
    generator = torch.Generator().manual_seed(seed)
    x_l = torch.randn(labeled, 3, size, size, generator=generator, dtype=torch.float64)
    x_u = torch.randn(unlabeled, 3, size, size, generator=generator, dtype=torch.float64)
    return x_l, torch.randint(0, num_classes, (labeled,), generator=generator), x_u


def modalities():
    """What is no image: name -> (model, x_l, y_l, x_u) in float64, with more unlabeled examples than labeled ones."""
    torch.manual_seed(6)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    models = {
        "points": nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 5)),
        "series": nn.Sequential(nn.Conv1d(3, 8, 5), nn.BatchNorm1d(8), nn.GELU(), nn.Flatten(), nn.Linear(128, 5)),
        "token ids": nn.Sequential(nn.Embedding(50, 16), encoder, nn.Flatten(), nn.Linear(128, 5))}
    x = {"points": torch.randn(10, 2).double(), "series": torch.randn(10, 3, 20).double(),
         "token ids": torch.randint(50, (10, 8))}
    return {name: (model.double(), x[name][:4], torch.tensor([0, 4, 2, 0]), x[name][4:]) for name, model in models.items()}
