"""Batch norm whose statistics are those of all processes, on CPUs too."""

import torch
from torch import Tensor, nn

from eekd.parallel.collectives import all_reduce_sum
from eekd.parallel.process_group import world_size

_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


def convert_sync_batchnorm(network: nn.Module) -> nn.Module:
    """The network with every batch norm taking its statistics over the batches of all processes.

    ValueError where one is of another class than torch's three, whose further doings would be lost.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in _NORMS:
            raise ValueError(f"{name} must be nn.BatchNorm1d, 2d or 3d for sync_batchnorm, got {type(module).__name__}")
    if next(network.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if type(module) in _NORMS:
            module.__class__ = SyncBatchNorm
    return network


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes on a CPU, where torch has none: E[x] and Var[x] of all of them."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        dims, x32 = [0, *range(2, x.ndim)], x.to(torch.promote_types(x.dtype, torch.float32))
        count = x32.new_full((1,), x.numel() / x.shape[1])
        count, mean = _Total.apply(torch.cat([count, x32.sum(dims)])).split([1, x.shape[1]])
        shape = 1, -1, *[1] * (x.ndim - 2)
        centred = x32 - (mean / count).view(shape)
        variance = _Total.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1  # pyright: ignore[reportOperatorIssue]
            share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean / count, share)
            self.running_var.lerp_(variance * (count / (count - 1)), share)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class _Total(torch.autograd.Function):
    """The sum over all processes, of the values and in the backward of their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return all_reduce_sum(dy)
