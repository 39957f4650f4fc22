"""Random crop, flip and normalization of whole batches, on the device that holds them."""
import torch
from torch.nn.functional import pad


def crop_and_flip(images, choices, padding):
    """Returns one window of the old size from each image, zero-padded by `padding` pixels, flipped where that is chosen.

    images: (B, C, H, W), any type.  choices: (B, 3) int64 on the same device, from `sampling.crop_and_flip_choices`.
    """
    height, width = images.shape[2:]
    rows, columns, flips = choices[:, :, None].unbind(dim=1)                                        # (B, 1)
    row, column = (torch.arange(size, device=images.device) for size in (height, width))
    column = columns + torch.where(flips.bool(), width - 1 - column, column)                        # (B, W)
    place = (rows + row)[:, :, None] * (width + 2 * padding) + column[:, None]                      # (B, H, W)
    padded = pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, place.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view(images.shape)


def normalize(images, mean, std):
    """Returns uint8 (B, C, H, W) as float32: pixels in [0, 1], less the mean, over the standard deviation (C,)."""
    return images.float().div_(255).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
