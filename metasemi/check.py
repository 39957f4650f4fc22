"""Tells whether a method is right for a network: what `torch.autograd.gradcheck` is to a function.

The reference shares with the three methods only the link of the consistency loss.  g comes from the model's own backward pass,
however it reaches its weights; the derivative along g from moving these weights themselves, in place, by several lengths, and
extrapolating to length zero.  A copy of the model would hide what is looked for: a function that keeps a weight keeps that of
the original.
"""
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metasemi.arguments import check_call, check_classes, check_logits
from metasemi.gradient import METHODS, UNREACHED, check_options, evaluation_mode, logits, meta_gradient
from metasemi.holding import as_it_was, in_type, random_state, set_random_state
from metasemi.losses import CONSISTENCY

TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-2}      # of the relative error; 0.2 in the half types
LENGTHS = {torch.float64: 8, torch.float32: 5}              # how many are tried, 3 in the half types
LONGEST, RATIO = 1e-2, 8                                    # the first, relative to the norm of the weights; to the next


def check_model(model: nn.Module, x_l: Tensor, y_l: Tensor, x_u: Tensor, method: str = "jvp", consistency: str = "mse",
                epsilon: float = 1e-2) -> float:
    """Returns the relative error of a method on a model, after looking for whatever would make it wrong.

    The model is tried in float64 if it runs so, else in its own type.  Afterwards it is bit for bit what it was, with its
    modes, attributes and gradients, and so are torch's random number generators.

    Args:
        model, x_l, y_l, x_u, method, consistency, epsilon: as in `meta_gradient`.  A few examples are enough.

    Returns:
        ||d - e|| / ||e||, d by the method and e by the reference, whose own error counts, too: about 1e-8, and up to 1e-4
        where activations have kinks.  That of the finite difference is its error at the given epsilon, and may be large: it
        is refused only if no smaller epsilon is right.  Where g is zero, both are, and nothing has been compared.

    Raises:
        ValueError: one sentence with what is wrong, where, and the remedy, for a model on which the method is wrong, and for
            one that draws random numbers in evaluation mode, makes parameters in its first forward, evaluates copies of its
            weights, or whose training changes state that matters and is not in `state_dict()`.
    """
    check_options(model, method, epsilon, consistency)
    check_call(model, x_l, y_l, x_u)
    with as_it_was(model, x_l.device), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        x = x_l if len(x_l) > len(x_u) else x_u
        check_passes(model, x)
        check_evaluation_weights(model, x)
        check_state(model, x)
        for dtype in (torch.float64, None):
            try:
                with as_it_was(model, x_l.device), in_type(model, dtype), evaluation_mode(model):
                    labeled, unlabeled = (x.to(dtype) if x.is_floating_point() else x for x in (x_l, x_u))
                    exact = reference(model, labeled, y_l, unlabeled, consistency)
                    error, fault = compare(model, labeled, y_l, unlabeled, method, consistency, epsilon, *exact)
                break
            except Exception:               # the device has no float64, or the network names its type
                if dtype is None:
                    raise
    if fault:
        raise ValueError(fault)
    return error


def compare(model, x_l, y_l, x_u, method, consistency, epsilon, exact, doubt, scale):
    """Returns the relative error of a method, and what is wrong with it or None; doubt is the uncertainty of `exact`."""
    allowed = TOLERANCE.get(exact.dtype, 0.2) + 2 * doubt / scale

    def tried(method, epsilon):
        """Returns the relative error of a method, infinite if it fails, and what to say of it."""
        try:
            found = meta_gradient(model, x_l, y_l, x_u, method, epsilon, consistency)[1]
        except Exception as fault:
            return torch.inf, f"fails ({type(fault).__name__}: {(str(fault).strip() or '?').splitlines()[0][:160]})"
        error = ((found - exact).norm() / scale).nan_to_num(torch.inf).item()
        return error, f"is {error:.1%} off"

    def right(method):
        lengths = [epsilon / 10 ** i for i in range(8 if method == "finite-difference" else 1)]
        return any(tried(method, length)[0] <= allowed for length in lengths)

    if doubt > scale / 20 and exact.dtype in TOLERANCE:
        return None, ("the predictions do not change smoothly as the weights move along the labeled gradient: the network "
                      "rounds, jumps, or draws random numbers from elsewhere than torch")
    error, said = tried(method, epsilon)
    if error <= allowed or right(method):
        return error, None
    if hidden := hidden_weights(model, x_l):
        return error, (f"the meta-gradient misses {names_of(hidden, model)}, which the logits depend on other than by a "
                       "registered name: reach each weight through its module, registered, when the model is called")
    others = [repr(other) for other in METHODS if other != method and right(other)]
    if others:
        return error, (f"the method {method!r} {said} on this model, where {' and '.join(others)} "
                       f"{'is' if len(others) == 1 else 'are'} right: take method={others[0]}")
    return error, (f"the method {method!r} {said} on this model, and no other is right: let the logits be a differentiable "
                   "function of the weights, without torch.no_grad(), detach(), or weights kept from one call to the next")


def reference(model, x_l, y_l, x_u, consistency):
    """Returns the derivative of the link of x_u's logits along g, its uncertainty, and its scale, three norms."""
    logits_l = check_logits(model(x_l), x_l, "evaluation")
    theta = leaves(logits_l)
    if not theta:
        raise ValueError(UNREACHED.format("logits depend"))
    check_classes(y_l, logits_l.shape[1])
    g = torch.autograd.grad(cross_entropy(logits_l, y_l), theta)
    norm, size = (torch.stack([t.detach().norm() for t in tensors]).norm().item() for tensors in (g, theta))
    before = [w.data.clone() for w in theta]
    unit = torch.finfo(logits_l.dtype).eps ** 0.5 * norm

    @torch.no_grad()
    def linked(step):
        for w, value, d in zip(theta, before, g):
            torch.add(value, d, alpha=step, out=w.data)
        return CONSISTENCY[consistency].link(model(x_u))

    with as_it_was(model, x_u.device, theta):
        best, doubt = extrapolated(linked, norm, LONGEST * (size or 1.0), LENGTHS.get(logits_l.dtype, 3))
    return best, doubt, max(best.norm().item(), unit * best.numel() ** 0.5, torch.finfo(best.dtype).tiny)


def extrapolated(linked, norm, length, count):
    """Returns the derivative of linked(step) at 0 and its uncertainty, from symmetric differences that step norm * step far."""
    best, doubt, above = linked(0.0) * 0, torch.inf if norm else 0.0, []
    for i in range(count if norm else 0):
        h = length / RATIO ** i / norm
        row, errors = [(linked(h) - linked(-h)) / (2 * h)], []
        for j, coarser in enumerate(above[:3]):             # Richardson's extrapolation: the error is a series in h^2
            row.append(row[j] + (row[j] - coarser) / (RATIO ** (2 * j + 2) - 1))
            errors.append(max((row[-1] - row[j]).norm(), (row[-1] - coarser).norm()).item())
            if errors[-1] < doubt:
                best, doubt = row[-1], errors[-1]
        # Where rounding has taken over, shorter lengths are no better; at the shortest nothing moves, and all agree.
        if errors and not 1e-7 * best.norm() < min(errors) < max(30 * doubt, best.norm() / 20):
            break
        above = row
    return best, doubt


def leaves(y):
    """Returns the tensors that require a gradient and that y depends on, from its graph."""
    found, seen, todo = [], set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [earlier for earlier, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.append(node.variable)
    return found


def names_of(weights, model):
    """Returns what to call weights, in one text."""
    names = {w: name for name, w in model.named_parameters()}
    return ", ".join(names.get(w, f"a weight of the shape {tuple(w.shape)} that is no parameter of the model") for w in weights)


def hidden_weights(model, x):
    """Returns the weights that the logits of x still depend on when every parameter is replaced by another tensor."""
    others = {name: w.detach().clone().requires_grad_() for name, w in model.named_parameters() if w.requires_grad}
    return [w for w in leaves(logits(model, others, x, None)) if w not in set(others.values())]


def same(a, b, tolerance=0.0):
    """Returns whether two tensors are equal, or their difference is small relative to them."""
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return bool((a - b).norm() <= tolerance * b.norm()) or bool(((a == b) | (a != a) & (b != b)).all())


def kept_state(model):
    """Returns a copy of the tensors in `state_dict()`."""
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def check_passes(model, x):
    """Raises ValueError if a pass in evaluation mode is not what it was, or has made the model another one."""
    names = {name for name, _ in model.named_parameters()}
    with as_it_was(model, x.device), torch.no_grad():
        weights = kept_state(model.train())
        for name, value in kept_state(model.eval()).items():
            if name in weights and not same(value, weights[name]):
                raise ValueError(f"train(False) of the model changes {name}, which train(True) cannot give back in every bit: "
                                 "add up such weights in forward")
        first = check_logits(model(x), x, "evaluation")
        for late in dict(model.named_parameters()).keys() - names:
            raise ValueError(f"the first forward makes the parameter {late}, which an optimizer made before does not have: "
                             "make it in __init__")
        if not first.isfinite().all():
            raise ValueError("the logits are not finite")
        begin = random_state(x.device)
        if not same(model(x), first, torch.finfo(first.dtype).eps ** 0.5):
            drew = not all(map(torch.equal, begin, random_state(x.device)))
            raise ValueError("two passes in evaluation mode give different logits: the network " + (
                "draws random numbers, so let it ask self.training, as dropout(x, p, self.training) does" if drew else
                "changes its own state, or draws random numbers from elsewhere than torch, which it must not in that mode"))


def check_evaluation_weights(model, x):
    """Raises ValueError if evaluation mode takes a weight from a copy that train(False) made of it."""
    with as_it_was(model, x.device):
        trained, first = leaves(check_logits(model.train()(x), x, "training")), model.eval()(x)
        evaluated = set(leaves(first))
        lost = [w for w in trained if w not in evaluated]
        with as_it_was(model, x.device, lost):
            for w in lost:
                w.data.copy_(w.data * 1.5 + 0.1)
            moved = model.train().eval()(x)
        if not same(moved, first, torch.finfo(first.dtype).eps ** 0.5):
            raise ValueError(f"in evaluation mode the logits depend on {names_of(lost, model)} only by copies that "
                             "train(False) made: take the weights themselves")


def check_state(model, x):
    """Raises ValueError if training changes state that `state_dict()` does not hold and the logits depend on."""
    begin = random_state(x.device)

    def passes():
        with as_it_was(model, x.device), torch.no_grad():
            set_random_state(x.device, begin)
            return [model.train(mode)(x) for mode in (False, True)]

    kept, before, again = kept_state(model), passes(), passes()
    with as_it_was(model, x.device):
        model.train()
        for _ in range(2):
            model(x)
        for name, value in model.state_dict().items():
            if name in kept and value.shape == kept[name].shape:
                value.copy_(kept[name])
        after = passes()
    for a, b, c in zip(before, again, after):
        unit = max(1e-5, 4 * torch.finfo(a.dtype).eps)
        if same(b, a, unit) and not same(c, a, unit):
            raise ValueError("training changes state that the logits depend on and state_dict() does not hold: make it a "
                             "persistent buffer")
