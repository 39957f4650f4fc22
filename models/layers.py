"""Layers that several networks share."""
import torch
from torch import nn
from torch.autograd.forward_ad import make_dual, unpack_dual
from torch.nn.functional import batch_norm, conv2d, leaky_relu


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, with fewer kernels: in evaluation mode its forward-mode derivative is made of two normalizations."""

    def forward(self, x):
        if self.training:
            return super().forward(x)
        (x, d_x), (weight, d_weight), (bias, d_bias) = map(unpack_dual, (x, self.weight, self.bias))
        y = self.normalized(x, self.running_mean, weight, bias)
        if d_x is None and d_weight is None and d_bias is None:
            return y
        d_weight, d_bias = (torch.zeros_like(weight) if d is None else d for d in (d_weight, d_bias))
        d_y = self.normalized(x, self.running_mean, d_weight, d_bias)
        if d_x is not None:
            d_y = d_y + self.normalized(d_x, torch.zeros_like(self.running_mean), weight, None)
        return make_dual(y, d_y)

    def normalized(self, x, mean, weight, bias):
        return batch_norm(x, mean, self.running_var, weight, bias, False, 0.0, self.eps)


class LeakyReLU(nn.LeakyReLU):
    """torch's, in place unless its input has a forward-mode derivative: both would be copied before they are overwritten."""

    def forward(self, x):
        return leaky_relu(x, self.negative_slope, inplace=unpack_dual(x).tangent is None)


class Fold(torch.autograd.Function):
    """The weight and bias of a convolution that normalizes its own result: weight * scale and beta - mean * scale, with
    scale = gamma * inverse_std, which is the third result.  As one function it starts half as many kernels, derivatives
    included, as its operations would.
    """

    @staticmethod
    def forward(weight, gamma, beta, mean, inverse_std):
        scale = gamma * inverse_std
        return weight * scale.view(-1, 1, 1, 1), torch.addcmul(beta, mean, scale, value=-1), scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, gamma, _, mean, inverse_std = inputs
        ctx.save_for_backward(weight, gamma, mean, inverse_std)
        ctx.save_for_forward(weight, output[2], mean, inverse_std)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, d_weight, d_bias, _):
        weight, gamma, mean, inverse_std = ctx.saved_tensors
        scale = gamma * inverse_std                 # again, for its own derivative
        d_scale = torch.addcmul((d_weight * weight).sum(dim=(1, 2, 3)), mean, d_bias, value=-1)
        return d_weight * scale.view(-1, 1, 1, 1), d_scale * inverse_std, d_bias, None, None

    @staticmethod
    def jvp(ctx, d_weight, d_gamma, d_beta, *_):
        weight, scale, mean, inverse_std = ctx.saved_tensors
        d_weight, d_gamma, d_beta = (torch.zeros_like(w) if d is None else d         # of frozen parameters
                                     for w, d in ((weight, d_weight), (mean, d_gamma), (mean, d_beta)))
        d_scale = d_gamma * inverse_std
        return (torch.addcmul(d_weight * scale.view(-1, 1, 1, 1), weight, d_scale.view(-1, 1, 1, 1)),
                torch.addcmul(d_beta, mean, d_scale, value=-1), None)


class ConvBN(nn.Module):
    """A convolution without bias, then batch normalization.

    In evaluation mode the normalization is an affine map per channel, and is folded into the convolution: the same
    function up to rounding, at a third of the cost of the forward-mode derivative of the two layers.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, **batch_norm):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = BatchNorm2d(out_channels, **batch_norm)

    def forward(self, x):
        if self.training:
            return self.bn(self.conv(x))
        inverse_std = (self.bn.running_var + self.bn.eps).rsqrt()
        weight, bias, _ = Fold.apply(self.conv.weight, self.bn.weight, self.bn.bias, self.bn.running_mean, inverse_std)
        return conv2d(x, weight, bias, self.conv.stride, self.conv.padding)
