"""Weight standardization."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.layers.convolution import convolve

__all__ = ["WSConv2d"]


class WSConv2d(nn.Conv2d):
    """Convolution with weight standardization (Qiao et al., arXiv 1903.10520, eq. 5-7).

    Every filter is used as (w - mean) / sqrt(var + 1e-5), mean and biased variance over its input
    channels and positions. Takes `torch.nn.Conv2d`'s arguments.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (N, C, H, W)."""
        weight = F.layer_norm(self.weight, self.weight.shape[1:], eps=1e-5)
        return convolve(self, input, weight, self.bias)
