"""ConvLarge, the 13-layer network of the semi-supervised literature (Laine & Aila, 2017), at any width."""
from torch import nn

from models.layers import ConvBN, LeakyReLU


def conv(in_channels, out_channels, kernel_size, padding=0):
    return nn.Sequential(ConvBN(in_channels, out_channels, kernel_size, padding=padding), LeakyReLU(0.1))


class ConvLarge(nn.Module):
    """Width 128 is the paper's ConvLarge: 3,121,802 parameters at 10 classes, 731 M multiply-adds on a 32x32 image.

    Width 16 (`convsmall`) is an eighth of it, for demos and tests; width 32 without dropout (`convnarrow`) fits a few
    hundred labels completely on a CPU.  dropout: the share of channels that is dropped.  Features: (B, width).
    """

    def __init__(self, num_classes, width=128, dropout=0.5):
        super().__init__()
        w = width
        self.body = nn.Sequential(
            conv(3, w, 3, 1), conv(w, w, 3, 1), conv(w, w, 3, 1),
            nn.MaxPool2d(2), nn.Dropout2d(dropout),                         # H -> H/2
            conv(w, 2 * w, 3, 1), conv(2 * w, 2 * w, 3, 1), conv(2 * w, 2 * w, 3, 1),
            nn.MaxPool2d(2), nn.Dropout2d(dropout),                         # H/2 -> H/4
            conv(2 * w, 4 * w, 3), conv(4 * w, 2 * w, 1), conv(2 * w, w, 1),   # H/4 -> H/4 - 2
        )
        self.classifier = nn.Linear(w, num_classes)

    def features(self, x):
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x):
        return self.classifier(self.features(x))
