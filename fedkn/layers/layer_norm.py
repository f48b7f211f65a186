"""LayerNorm over channels and pixels."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["LayerNorm2d"]


class LayerNorm2d(nn.GroupNorm):
    """Normalize each sample of (N, C, H, W) over C, H and W; one gain and bias per channel.

    This is the layer that "LayerNorm" means for convolutional networks in the papers KernelNorm is
    compared with: GroupNorm with a single group (Ba et al., arXiv 1607.06450, eq. 3; Wu and He,
    arXiv 1803.08494, sec. 3). ConvNeXt's LayerNorm2d, which normalizes every pixel over its
    channels, is another layer.
    """

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(1, num_channels, eps=eps, affine=affine, device=device, dtype=dtype)
