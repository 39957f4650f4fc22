"""Batch normalization over the batches of all processes of a run, as if they were one."""
from functools import partial

import torch
from torch.nn.modules.batchnorm import _BatchNorm


class Mean(torch.autograd.Function):
    """The mean of a tensor over the processes.

    In backward the same again: the loss is the mean of those of the processes, and each reaches them all.
    """

    @staticmethod
    def forward(ctx, x, average):
        ctx.average = average
        return average([x])[0]

    @staticmethod
    def backward(ctx, d):
        return ctx.average([d])[0], None


def synchronize_batch_norm(model, average, processes):
    """Makes every batch normalization of a model take mean and variance over all processes in training mode.

    average: a list of tensors to the list of their means over the processes.  All must have equally many images.
    Parameters, buffers, names and evaluation mode stay as they are.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = partial(forward, module, partial(Mean.apply, average=average), processes)


def forward(bn, mean_of, processes, x):
    """x: (B, C, ...)."""
    if not bn.training:
        return type(bn).forward(bn, x)
    across = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    # The deviations from the mean rather than the squares: in float32 their difference would lose digits.
    z = x if x.dtype == torch.float64 else x.float()
    mean = mean_of(z.mean(across))
    z = z - mean.view(shape)
    variance = mean_of(z.square().mean(across))
    if bn.track_running_stats:
        with torch.no_grad():
            bn.num_batches_tracked += 1
            factor = 1 / bn.num_batches_tracked if bn.momentum is None else bn.momentum
            count = processes * x.numel() // x.shape[1]
            bn.running_mean.mul_(1 - factor).add_(mean * factor)
            bn.running_var.mul_(1 - factor).add_(variance * (factor * count / (count - 1)))
    z = z * (variance + bn.eps).rsqrt().view(shape)
    if bn.affine:
        z = z * bn.weight.view(shape) + bn.bias.view(shape)
    return z.to(x.dtype)
