"""Layer normalization over all channels and pixels of an example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.layers import LayerNorm2d
from fedkn.normalizers.fused import FusedNormalizer

__all__ = ["LayerNormalizer"]


@dataclass(frozen=True)
class LayerNormalizer(FusedNormalizer):
    """LayerNorm: statistics per example over channels and pixels, affine per channel."""

    name: ClassVar[str] = "layer"
    title: ClassVar[str] = "LayerNorm"
    paper: ClassVar[str] = "Ba, Kiros & Hinton, 2016, arXiv 1607.06450, Eq. 3"
    statistics: ClassVar[str] = "the whole image"
    not_for: ClassVar[str] = (
        "Convolutions whose channels contribute unalike, says GroupNorm's paper, because one "
        "mean and variance serve them all; on MNIST it is in the lower half of every column of "
        "docs/early-training.md."
    )
    affine: ClassVar[bool] = True

    def norm(self, channels: int) -> nn.Module:
        """Return LayerNorm2d."""
        return LayerNorm2d(channels)
