"""Random crop, flip and normalization of whole batches, on the device that holds them."""
import torch
from torch.nn.functional import pad


def crop_and_flip(images, choices, padding):
    """Zero-pads by `padding` pixels and takes one window of the old size per image.

    images: (B, C, H, W), any type.  choices: (B, 3) int64 on the same device, from `sampling.crop_and_flip_choices`.
    """
    height, width = images.shape[2:]
    rows, columns, flips = choices.unbind(dim=1)
    windows = pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2p+1, 2p+1, H, W), a view
    cropped = windows[torch.arange(len(images), device=images.device), :, rows, columns]    # (B, C, H, W)
    return torch.where(flips.bool().view(-1, 1, 1, 1), cropped.flip(3), cropped)


def normalize(images, mean, std):
    """uint8 (B, C, H, W) to float32: pixels to [0, 1], less the mean, over the standard deviation (C,)."""
    return images.float().div_(255).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
