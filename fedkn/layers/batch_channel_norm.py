"""Batch-channel normalization with estimated statistics, for micro-batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.layers.per_channel import MEAN_AND_VARIANCE, PerChannel, per_channel

__all__ = ["BatchChannelNorm2d"]


class BatchChannelNorm2d(PerChannel):
    """Micro-batch BCN (Qiao et al., arXiv 1903.10520, section on Batch-Channel Normalization).

    Batch normalization by running estimates, then channel normalization. In training, per channel
    of (N, C, H, W), with the mean mu_B of the batch and the mean square v_B of its distance from
    the estimate as it was::

        mu += momentum * (mu_B - mu)        var += momentum * (v_B - var)
        z = gamma * (x - mu) / sqrt(var + eps) + beta

    and then, per example, with the mean and biased variance of each group of channels of z::

        y = scale_g * (z - mu_g) / sqrt(var_g + eps) + shift_g

    The estimates are constants to the gradient, so a single example can be trained on, and they are
    what evaluation uses. gamma, beta are learned per channel, scale and shift per group
    (``group_weight``, ``group_bias``), as in the authors' code.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, MEAN_AND_VARIANCE, eps=eps, device=device, dtype=dtype)
        self.num_groups, self.momentum = num_groups, momentum
        self.group_weight = nn.Parameter(torch.ones(num_groups, device=device, dtype=dtype))
        self.group_bias = nn.Parameter(torch.zeros(num_groups, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape; in training the estimates move."""
        wide = self.wide(x)
        if self.training:
            with torch.no_grad():
                mean = wide.mean((0, 2, 3))
                spread = (wide - per_channel(self.running_mean)).square().mean((0, 2, 3))
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(spread, self.momentum)
        # What the backward pass needs must not be what the next batch writes to.
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean.clone() * scale
        z = wide * per_channel(scale) + per_channel(shift)
        each = self.num_channels // self.num_groups
        y = F.group_norm(
            z,
            self.num_groups,
            self.group_weight.repeat_interleave(each),
            self.group_bias.repeat_interleave(each),
            self.eps,
        )
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.num_groups}, {self.num_channels}, momentum={self.momentum}"
