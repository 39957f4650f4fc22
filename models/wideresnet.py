"""WideResNet (Zagoruyko & Komodakis, 2016) in the form of the semi-supervised literature (Oliver et al., 2018):
LeakyReLU(0.1), batch-norm momentum 0.001, and a first block that activates before the shortcut leaves."""
from torch import nn

from models.layers import BatchNorm2d, ConvBN, LeakyReLU

SLOPE, MOMENTUM = 0.1, 0.001


class Block(nn.Module):
    """Pre-activation residual block; `activate_before_shortcut` feeds the shortcut the activated input as well."""

    def __init__(self, in_channels, out_channels, stride, activate_before_shortcut):
        super().__init__()
        self.bn1 = BatchNorm2d(in_channels, momentum=MOMENTUM)
        self.conv1 = ConvBN(in_channels, out_channels, 3, stride, 1, momentum=MOMENTUM)     # with the second bn
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.activate, self.activate_before_shortcut = LeakyReLU(SLOPE), activate_before_shortcut

    def forward(self, x):
        out = self.activate(self.bn1(x))
        shortcut = self.shortcut(out if self.activate_before_shortcut else x)
        return self.conv2(self.activate(self.conv1(out))) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-widen.  28-2 has 1,467,610 parameters at 10 classes.  Features: (B, 64 * widen)."""

    def __init__(self, num_classes, depth=28, widen=2):
        super().__init__()
        channels = [16, 16 * widen, 32 * widen, 64 * widen]
        blocks = []
        for stage in range(3):
            for i in range((depth - 4) // 6):
                blocks.append(Block(channels[stage] if i == 0 else channels[stage + 1], channels[stage + 1],
                                    stride=2 if stage > 0 and i == 0 else 1,
                                    activate_before_shortcut=stage == 0 and i == 0))
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.bn = BatchNorm2d(channels[3], momentum=MOMENTUM)
        self.activate = LeakyReLU(SLOPE)
        self.classifier = nn.Linear(channels[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE, mode="fan_out", nonlinearity="leaky_relu")
        nn.init.xavier_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def features(self, x):
        return self.activate(self.bn(self.blocks(self.stem(x)))).mean(dim=(2, 3))

    def forward(self, x):
        return self.classifier(self.features(x))
