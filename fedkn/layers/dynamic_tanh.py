"""Dynamic Tanh: no statistics, a learned squashing of every number by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["DynamicTanh2d"]


class DynamicTanh2d(nn.Module):
    """Dynamic Tanh (Zhu et al., CVPR 2025, arXiv 2503.10622, eq. 1 of its section 4).

    ``y = gamma * tanh(alpha * x) + beta`` on (N, C, H, W), alpha one learned number of the layer,
    gamma and beta learned per channel, from 1 and 0.

    Args:
        num_channels: C.
        alpha: where the learned alpha begins; 0.5 in the paper, for everything but language models.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        alpha: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        # One number in a vector: arrays without dimensions have crashed Flower.
        self.alpha = nn.Parameter(torch.full((1,), alpha, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        y = torch.tanh(self.alpha.view(1, 1, 1) * x)
        return y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return f"{self.num_channels}"
