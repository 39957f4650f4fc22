"""Layers that several networks share."""
from torch import nn
from torch.nn.functional import conv2d


class ConvBN(nn.Module):
    """A convolution without bias, then batch normalization.

    In evaluation mode the normalization is an affine map per channel, and is folded into the convolution: the same
    function up to rounding, at a third of the cost of the forward-mode derivative of the two layers.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, **batch_norm):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, **batch_norm)

    def forward(self, x):
        if self.training:
            return self.bn(self.conv(x))
        # Copied into clones of a parameter, the statistics have a zero tangent in forward mode.  Without one, a product costs
        # 110 microseconds there instead of 3: torch looks for the shape of the zero in Python.
        mean, inverse_std = (self.bn.weight.clone().copy_(values) for values in
                             (self.bn.running_mean, (self.bn.running_var + self.bn.eps).rsqrt()))
        scale = self.bn.weight * inverse_std
        shift = self.bn.bias - mean * scale
        return conv2d(x, self.conv.weight * scale.view(-1, 1, 1, 1), shift, self.conv.stride, self.conv.padding)
