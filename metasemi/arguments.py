"""Refusals: each says in one sentence what is wrong with a call, and what to do, before anything has moved."""
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize


def check_call(model: nn.Module, x_l: Tensor, y_l: Tensor, x_u: Tensor) -> None:
    """Raises ValueError for a batch of wrong shape or type, and for a model or a place where the method would be wrong."""
    for name, x in (("x_l", x_l), ("y_l", y_l), ("x_u", x_u)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}: expected a tensor; put a network of several inputs into a "
                             "module that takes them from one")
        if x.dim() == 0 or len(x) == 0:
            raise ValueError(f"{name} has the shape {tuple(x.shape)}: expected (B, ...) with at least one example")
    if y_l.shape != x_l.shape[:1] or y_l.dtype != torch.int64:
        raise ValueError(f"y_l is {y_l.dtype} of the shape {tuple(y_l.shape)}: expected the class index of each example of "
                         f"x_l, torch.int64 of the shape ({len(x_l)},)")
    for name, w in model.named_parameters():
        if is_lazy(w):
            raise ValueError(f"the parameter {name} has no shape yet: give its layer the number of its inputs")
    if torch.is_inference_mode_enabled() or any(t.is_inference() for t in (x_l, x_u, *model.parameters())):
        raise ValueError("nothing that torch.inference_mode() made or surrounds can be differentiated: take torch.no_grad() "
                         "instead, and make data and model outside")
    if getattr(parametrize, "_cache_enabled", 0):
        raise ValueError("inside parametrize.cached() the weights are kept from earlier calls: call outside")
    for module in model.modules():
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ValueError(f"the model is in a {type(module).__name__}, which does not see the labeled gradient: pass the "
                             "module inside it, one process a device, and a mean over the processes as `average`")


def check_logits(logits: Tensor, x: Tensor, mode: str) -> Tensor:
    """Returns what a model gave for x, (B, ...), if it is a tensor (B, K), K at least 2; raises ValueError otherwise."""
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model gives a {type(logits).__name__} for {len(x)} examples in {mode} mode: expected logits of "
                         f"the shape ({len(x)}, K); put it into a module whose forward returns the logits alone")
    if logits.shape[:-1] != x.shape[:1] or logits.shape[1] < 2:
        raise ValueError(f"the model gives the shape {tuple(logits.shape)} for {len(x)} examples in {mode} mode: expected "
                         f"logits of the shape ({len(x)}, K), K at least 2")
    return logits


def check_dense(gradients: dict[str, Tensor]) -> None:
    """Raises ValueError if one of the gradients, by the names of their weights, is sparse."""
    for name, d in gradients.items():
        if d.layout != torch.strided:
            raise ValueError(f"the gradient of {name} is sparse: make its embedding with sparse=False")


def check_classes(y: Tensor, num_classes: int) -> None:
    """Raises ValueError for a class outside 0..K-1 on the CPU; for an accelerator's answer the host would have to wait."""
    if y.device.type == "cpu":
        low, high = (int(bound) for bound in y.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"y_l holds the class {low if low < 0 else high}: expected 0 to {num_classes - 1}, since the "
                             f"model gives {num_classes} logits")


def check_shares(lam: Tensor) -> None:
    """Raises ValueError for a mix-up weight outside [0, 1] on the CPU."""
    if lam.device.type == "cpu" and not (lam.clamp(0, 1) == lam).all():
        raise ValueError(f"lam reaches from {lam.min().item():g} to {lam.max().item():g}: expected shares between 0 and 1")
