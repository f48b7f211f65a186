"""The 3x3 convolution of maps with few channels, by Winograd's algorithm F(2x2, 3x3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedkn.layers.plain_convolution import plain

__all__ = ["serves", "winograd"]


def serves(layer: nn.Conv2d, x: object) -> bool:
    """Whether `winograd` takes these.

    A plain 3x3 convolution with padding 1, of 8 to 128 channels to as many, both
    multiples of eight, applied to eager float32 maps on the CPU, channels last, of at least eight
    tiles of 2x2 pixels in all. The processor has AVX2 and FMA, or more.
    """
    return plain(x, layer) and _lanes(layer, x) > 0


def winograd(layer: nn.Conv2d, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return x convolved as by the layer, (N, C, H, W) to (N, O, H, W); only what it `serves`.

    Without the layer's bias, by `weight` in place of its own where it is given, equal to rounding.
    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1: 16
    products for what takes 36, forward and in both gradients. The result is channels last. The bits
    do not depend on the number of threads. Differentiable twice.
    """
    used = layer.weight if weight is None else weight
    y: Tensor = torch.ops.fedkn_native.winograd(x, used, _lanes(layer, x))
    return y


def _lanes(layer: nn.Conv2d, x: Tensor) -> int:
    """The numbers of a vector; 0 where the processor has none, or the sizes are not for it."""
    lanes: int = torch.ops.fedkn_native.winograd_lanes(x.shape, layer.out_channels)
    return lanes
