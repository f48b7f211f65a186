"""SkipInit: a residual branch that begins as nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SkipInit"]


class SkipInit(nn.Module):
    """Multiply by one learned number, which begins at zero (De & Smith, arXiv 2002.10444, Sec. 4).

    At the end of every residual branch it makes a network begin as its shortcuts alone.
    """

    def __init__(self) -> None:
        super().__init__()
        # One number in a vector: arrays without dimensions have crashed Flower.
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return x * self.gain.view(1, 1, 1)
