"""Instance normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.normalizers.fused import FusedNormalizer, refuse_single_value

__all__ = ["InstanceNormalizer"]


@dataclass(frozen=True)
class InstanceNormalizer(FusedNormalizer):
    """InstanceNorm: statistics per example and channel over the pixels.

    It cannot train on 1x1 maps, where it would erase its input; that is a UserError in training.
    """

    name: ClassVar[str] = "instance"
    title: ClassVar[str] = "InstanceNorm"
    paper: ClassVar[str] = "Ulyanov, Vedaldi & Lempitsky, 2016, arXiv 1607.08022, Eq. 2"
    statistics: ClassVar[str] = "all pixels, per image and channel"
    not_for: ClassVar[str] = (
        "Small maps and classes told apart by the strength of a channel over the whole image "
        "(contrast, brightness): that strength is normalized away, and a 1x1 map would be "
        "erased, which is an error in training."
    )
    affine: ClassVar[bool] = True

    def norm(self, channels: int) -> nn.Module:
        """Return InstanceNorm2d with scale and bias, without running statistics."""
        layer = nn.InstanceNorm2d(channels, affine=True)
        layer.register_forward_pre_hook(refuse_single_value)
        return layer
