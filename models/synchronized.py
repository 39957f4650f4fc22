"""Batch normalization over the batches of all processes of a run, as if they were one."""
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
    The modules stay the same objects, with their parameters, buffers, names and evaluation mode.
    """
    shared = {"average": staticmethod(average), "processes": processes}
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = type(type(module).__name__, (Synchronized, type(module)), shared)


class Synchronized(_BatchNorm):
    """Put before the class of a batch normalization, with `average` and `processes` of `synchronize_batch_norm`."""

    def forward(self, x):
        """x: (B, C, ...)."""
        if not self.training:
            return super().forward(x)
        across = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        # The deviations from the mean rather than the squares: in float32 their difference would lose digits.
        z = x if x.dtype == torch.float64 else x.float()
        mean = Mean.apply(z.mean(across), self.average)
        z = z - mean.view(shape)
        variance = Mean.apply(z.square().mean(across), self.average)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                factor = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                count = self.processes * x.numel() // x.shape[1]
                self.running_mean.mul_(1 - factor).add_(mean * factor)
                self.running_var.mul_(1 - factor).add_(variance * (factor * count / (count - 1)))
        z = z * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            z = z * self.weight.view(shape) + self.bias.view(shape)
        return z.to(x.dtype)
