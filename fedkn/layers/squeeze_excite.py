"""Squeeze-and-excitation: channels weighted by what the whole map holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SqueezeExcite2d"]


class SqueezeExcite2d(nn.Module):
    """Squeeze-and-excitation (Hu, Shen & Sun, CVPR 2018, arXiv 1709.01507, eq. 2 to 4).

    ``y = x * sigmoid(W2 relu(W1 z + b1) + b2)``, z the mean of each channel of (N, C, H, W) over
    its pixels: a weight for every channel of every example. W1 leaves C / `reduction` numbers, at
    least one.
    """

    def __init__(self, num_channels: int, reduction: int = 16) -> None:
        super().__init__()
        inner = max(1, num_channels // reduction)
        self.squeeze = nn.Linear(num_channels, inner)
        self.excite = nn.Linear(inner, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        inner = torch.relu(self.squeeze(x.mean((2, 3))))
        weights: Tensor = torch.sigmoid(self.excite(inner))
        return x * weights[..., None, None]
