"""Dynamic Tanh: no statistics, a learned tanh in the place of a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.layers import DynamicTanh2d
from fedkn.normalizers.base import Normalizer

__all__ = ["DynamicTanhNormalizer"]


@dataclass(frozen=True)
class DynamicTanhNormalizer(Normalizer):
    """DyT: ``gamma * tanh(alpha * x) + beta``, alpha one learned number of each layer, from 0.5.

    Where a norm is followed by an activation, so is it.

    Federation rule: alpha, gamma and beta are shared.
    """

    name: ClassVar[str] = "dyt"
    title: ClassVar[str] = "Dynamic Tanh"
    paper: ClassVar[str] = "Zhu et al., CVPR 2025, arXiv 2503.10622, Sec. 4"
    statistics: ClassVar[str] = ""
    not_for: ClassVar[str] = (
        "Convolutional networks made for BatchNorm: it was proposed in the place of a "
        "Transformer's LayerNorm, and its paper finds it below BatchNorm in ResNet-50 and VGG19."
    )
    affine: ClassVar[bool] = True

    def norm(self, channels: int) -> nn.Module:
        """Return DynamicTanh2d."""
        return DynamicTanh2d(channels)
