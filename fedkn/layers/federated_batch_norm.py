"""Batch normalization by the statistics of all clients: FBN, and HBN's mixture with the batch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.layers.moments import Moments
from fedkn.layers.per_channel import MEAN_AND_VARIANCE, PerChannel, per_channel

__all__ = ["FederatedBatchNorm2d", "HybridBatchNorm2d"]


class _GlobalStatistics(PerChannel):
    """A norm whose global statistics training does not change."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, MEAN_AND_VARIANCE, eps=eps, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.num_channels}, eps={self.eps}"


class FederatedBatchNorm2d(_GlobalStatistics):
    """Normalize (N, C, H, W) by global statistics, in training as in evaluation.

    Per channel, with the global mean mu_g and variance var_g, which training does not change::

        y = gamma * (x - mu_g) / sqrt(var_g + eps) + beta

    In training, `moments` takes in the values of every batch. They are constants to the gradient,
    so nothing that is made of one example depends on another.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps=eps, device=device, dtype=dtype)
        self.moments = Moments(num_channels, device)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        if self.training:
            self.moments(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class HybridBatchNorm2d(_GlobalStatistics):
    """Normalize (N, C, H, W) by a learned mixture of global and batch statistics.

    Hybrid batch normalization (Chen et al., ICML 2025, arXiv 2505.21877). Per channel, with the
    factor ``a = sigmoid(mixing)``, initially 1/2, and biased variances, in training::

        mu = (1 - a) mu_g + a mu_B        var = (1 - a) var_g + a var_B
        y = gamma * (x - mu) / sqrt(var + eps) + beta

    The gradient goes through the batch statistics and the factor; the global statistics are
    constants. In evaluation, mu_g and var_g alone. A batch of a single value per channel is not
    erased: it is centred by the mixture and divided by the global variance's part.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels, eps=eps, device=device, dtype=dtype)
        self.mixing = nn.Parameter(torch.zeros_like(self.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        mean, variance = self.running_mean, self.running_var
        wide = self.wide(x)
        if self.training:
            batch_variance, batch_mean = torch.var_mean(wide, (0, 2, 3), correction=0)
            share = torch.sigmoid(self.mixing)
            mean = torch.lerp(mean, batch_mean, share)
            variance = torch.lerp(variance, batch_variance, share)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        y = (wide - per_channel(mean)) * per_channel(scale) + per_channel(self.bias)
        return y.to(x.dtype)
