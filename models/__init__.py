"""The networks.  Each has `forward(x) -> (B, K)` logits and `features(x) -> (B, D)`, the pooled features before the last layer.

Inputs are normalized float images (B, 3, H, W), H and W from 16 up.  Importing this package loads nothing;
torch arrives with the first `build_model`.
"""
from importlib import import_module

NETWORKS = {                    # name -> (module, class, keyword arguments)
    "convlarge": ("models.convlarge", "ConvLarge", {"width": 128}),
    "convsmall": ("models.convlarge", "ConvLarge", {"width": 16}),
    "wideresnet": ("models.wideresnet", "WideResNet", {"depth": 28, "widen": 2}),
    "shakeshake": ("models.shakeshake", "ShakeShake", {"depth": 26, "width": 96}),
    "resnet18": ("models.resnet", "ResNet", {"depth": 18}),
    "resnet50": ("models.resnet", "ResNet", {"depth": 50}),
}


def build_model(name, num_classes):
    """A freshly initialized network (from torch's global generator) on the CPU, in training mode.

    Raises ValueError for a name that is not in NETWORKS.
    """
    if name not in NETWORKS:
        raise ValueError(f"no network is named {name!r}; choose from {', '.join(NETWORKS)}")
    module, cls, kwargs = NETWORKS[name]
    return getattr(import_module(module), cls)(num_classes, **kwargs)
