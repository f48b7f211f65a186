"""Root mean square normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.layers import RMSNorm2d
from fedkn.normalizers.base import Normalizer

__all__ = ["RMSNormalizer"]


@dataclass(frozen=True)
class RMSNormalizer(Normalizer):
    """RMSNorm: ``gamma * x / sqrt(mean(x^2) + eps) + beta``, affine per channel.

    The mean is per example over all channels and pixels, the axes of the 'layer' normalizer:
    RMSNorm was proposed as LayerNorm without centring, so between the two only that differs.

    Federation rule: gamma and beta are shared.
    """

    name: ClassVar[str] = "rms"
    title: ClassVar[str] = "RMSNorm"
    paper: ClassVar[str] = "Zhang & Sennrich, NeurIPS 2019, arXiv 1910.07467, Eq. 4"
    statistics: ClassVar[str] = "the whole image; not centred"
    not_for: ClassVar[str] = (
        "Maps with a mean that should go, which it leaves; its paper promises less time than "
        "LayerNorm, not fewer errors, and in docs/early-training.md it is now above, now below "
        "layer, and below ws_group in every column."
    )
    affine: ClassVar[bool] = True

    def norm(self, channels: int) -> nn.Module:
        """Return RMSNorm2d."""
        return RMSNorm2d(channels)
