"""KNConv with weight standardization: nobody has published it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fedkn.layers.kernel.layer import KNConv2d

__all__ = ["WSKNConv2d"]


class WSKNConv2d(KNConv2d):
    """`KNConv2d` whose filters are standardized as `WSConv2d`'s are (arXiv 1903.10520, eq. 5-7).

    Every filter is used as (w - mean) / sqrt(var + 1e-5), mean and biased variance over its input
    channels and positions. Its weights then sum to zero, so that nothing is left of a window's mean
    to take away: the window's deviation alone normalizes. Takes `KNConv2d`'s arguments.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (N, C, H, W)."""
        return self.apply_to(x)

    def filters(self) -> Tensor:
        """Return the standardized filters (O, C/groups, KH, KW)."""
        return F.layer_norm(self.weight, self.weight.shape[1:], eps=1e-5)
