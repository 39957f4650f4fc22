"""Shake-Shake-26 2x96d (Gastaldi, 2017): two branches a block, mixed by a random gate per image."""
import torch
from torch import nn
from torch.nn.functional import pad, relu

from models.layers import BatchNorm2d, ConvBN


def shake(a, b, training):
    """Mixes two branches (B, C, H, W): evenly in evaluation mode; in training mode with one random gate per image
    for the value and another, independent, for the derivative.

    The detached difference carries the value and no derivative, so the second gate governs reverse mode, forward
    mode and double backward alike.  Evaluation mode draws nothing: the meta-gradient must not be noisy.
    """
    if not training:
        return torch.lerp(a, b, 0.5)
    gates = torch.rand(2, a.shape[0], 1, 1, 1, device=a.device).to(a.dtype)
    value, derivative = (torch.lerp(b, a, gate) for gate in gates)
    return derivative + (value - derivative).detach()


class ShiftConv(nn.Module):
    """Halves the resolution of a shortcut: every second pixel, and every second pixel shifted by one, through a
    1x1 convolution each, side by side."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels // 2, 1, bias=False)
        self.conv2 = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, bias=False)

    def forward(self, x):
        shifted = pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        return torch.cat([self.conv1(x[:, :, ::2, ::2]), self.conv2(shifted[:, :, ::2, ::2])], dim=1)


class Block(nn.Module):
    """Two branches and a shortcut.  The activation that begins both branches is computed once; nn.Identity stands for it."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Identity(), ConvBN(in_channels, out_channels, 3, stride, 1),
                          nn.ReLU(), ConvBN(out_channels, out_channels, 3, 1, 1)) for _ in range(2))
        self.halves = stride == 2
        if in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif stride == 1:
            self.shortcut = ConvBN(in_channels, out_channels, 1)
        else:
            self.shortcut = nn.Sequential(nn.Identity(), ShiftConv(in_channels, out_channels),
                                          BatchNorm2d(out_channels))

    def forward(self, x):
        activated = relu(x)
        a, b = (branch(activated) for branch in self.branches)
        return self.shortcut(activated if self.halves else x) + shake(a, b, self.training)


class ShakeShake(nn.Module):
    """Three stages of (depth - 2) / 6 blocks at 1, 2 and 4 times `width` channels.  Features: (B, 4 * width)."""

    def __init__(self, num_classes, depth=26, width=96):
        super().__init__()
        blocks, channels = [], 16
        for stage in range(3):
            for i in range((depth - 2) // 6):
                out_channels = width * 2 ** stage
                blocks.append(Block(channels, out_channels, stride=2 if stage > 0 and i == 0 else 1))
                channels = out_channels
        self.stem = ConvBN(3, 16, 3, 1, 1)
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, num_classes)

    def features(self, x):
        return relu(self.blocks(self.stem(x))).mean(dim=(2, 3))

    def forward(self, x):
        return self.classifier(self.features(x))
