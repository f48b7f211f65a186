"""A learned factor for every channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ChannelGain"]


class ChannelGain(nn.Module):
    """Multiply every channel of (N, C, H, W) by a learned number, which begins at one.

    What is left of a norm's affine parameters where the convolution before has a bias: as the gain
    of standardized filters in Brock et al. (arXiv 2101.08692, Sec. 4.1).

    Args:
        num_channels: C.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return x * self.weight.view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return f"{self.num_channels}"
