"""What norms have in common that keep statistics of every channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["MEAN_AND_VARIANCE", "PerChannel", "per_channel"]

MEAN_AND_VARIANCE = {"running_mean": 0.0, "running_var": 1.0}
"""The running statistics of most, and where they begin."""


class PerChannel(nn.Module):
    """A scale and a bias per channel, from 1 and 0, and buffers per channel, from where they begin.

    Args:
        num_channels: C; all are of shape (C,).
        statistics: the names of the buffers and the number in which each begins.
    """

    def __init__(
        self,
        num_channels: int,
        statistics: Mapping[str, float],
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels, self.eps = num_channels, eps
        ones = torch.ones(num_channels, device=device, dtype=dtype)
        self.weight = nn.Parameter(ones.clone())
        self.bias = nn.Parameter(torch.zeros_like(ones))
        for name, value in statistics.items():
            self.register_buffer(name, torch.full_like(ones, value))

    def wide(self, x: Tensor) -> Tensor:
        """Return `x` in the dtype of the parameters, where that has more bits (under autocast)."""
        return x.to(torch.promote_types(x.dtype, self.weight.dtype))


def per_channel(values: Tensor) -> Tensor:
    """Return `values` (C,) as they go with maps (N, C, H, W)."""
    return values.view(-1, 1, 1)
