"""Weight standardization with group normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.layers import WSConv2d
from fedkn.normalizers.group import GroupNormalizer

__all__ = ["WeightStandardizedGroupNormalizer"]


@dataclass(frozen=True)
class WeightStandardizedGroupNormalizer(GroupNormalizer):
    """Every convolution's weights standardized per output channel, then GroupNorm.

    Options as for `GroupNormalizer`.
    """

    name: ClassVar[str] = "ws_group"
    title: ClassVar[str] = "weight standardization + GroupNorm"
    paper: ClassVar[str] = "Qiao et al., 2019, arXiv 1903.10520, Eq. 5"
    statistics: ClassVar[str] = (
        "the channels of a group and all pixels, per image; weights per output channel"
    )
    not_for: ClassVar[str] = (
        "Filters of few weights (1x1 over few channels, depthwise), of which standardizing "
        "takes two degrees of freedom each; two labels a client on CIFAR-10, where batch has "
        "the higher mean at batches of 2 and 8 (docs/early-training.md)."
    )
    affine: ClassVar[bool] = True

    _conv_layer: ClassVar[type[nn.Conv2d]] = WSConv2d
