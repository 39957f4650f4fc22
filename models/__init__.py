"""The networks.  Each has `forward(x) -> (B, K)` logits and `features(x) -> (B, D)`, the pooled features before the last layer.

Inputs are normalized float images (B, 3, H, W), H and W from 16 up.  Importing this package loads nothing;
torch arrives with the first `build_model`.
"""
from importlib import import_module

from models.custom import NetworkError, build_custom, check_network, is_custom

__all__ = ["NETWORKS", "NetworkError", "build_model", "check_network", "is_custom"]

NETWORKS = {                    # name -> (module, class, keyword arguments)
    "convlarge": ("models.convlarge", "ConvLarge", {"width": 128}),
    "convsmall": ("models.convlarge", "ConvLarge", {"width": 16}),
    "convnarrow": ("models.convlarge", "ConvLarge", {"width": 32, "dropout": 0.0}),
    "wideresnet": ("models.wideresnet", "WideResNet", {"depth": 28, "widen": 2}),
    "shakeshake": ("models.shakeshake", "ShakeShake", {"depth": 26, "width": 96}),
    "resnet18": ("models.resnet", "ResNet", {"depth": 18}),
    "resnet50": ("models.resnet", "ResNet", {"depth": 50}),
}


def build_model(name, num_classes, device=None):
    """Returns a network in training mode, with its first weights from torch's global generator.

    Args:
        name: a key of NETWORKS, or FILE.py:CLASS, a class in a file that is executed: never pass what a file says.
        num_classes: K, at least 2.
        device: where it is put, channels-last, which is faster; a network of the user's own keeps its layout, since its
            forward may use `view`.  None: it stays on the CPU as it was made.

    Raises:
        NetworkError, a ValueError: for a name that is not in NETWORKS, or a file whose network cannot be built.
    """
    if is_custom(name):
        return build_custom(name, num_classes).to(device)
    if name not in NETWORKS:
        raise NetworkError(f"{name}: no network has that name; choose from {', '.join(NETWORKS)}")
    import torch

    module, cls, kwargs = NETWORKS[name]
    model = getattr(import_module(module), cls)(num_classes, **kwargs)
    return model if device is None else model.to(device, memory_format=torch.channels_last)
