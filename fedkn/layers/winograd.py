"""The 3x3 convolution of maps with few channels, by Winograd's algorithm F(2x2, 3x3)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from fedkn.layers.plain_convolution import plain

__all__ = ["serves", "winograd"]


def serves(layer: nn.Conv2d, x: object) -> bool:
    """Whether `winograd` takes these.

    A plain 3x3 convolution with padding 1, without bias, of 8 to 128 channels to as many, both
    multiples of eight, applied to eager float32 maps on the CPU, channels last. The processor has
    AVX2 and FMA, or more.
    """
    return _few(layer.in_channels) and _few(layer.out_channels) and plain(layer, x) and _lanes() > 0


def winograd(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return ``layer(x)``, (N, C, H, W) to (N, O, H, W), equal to rounding; only what it `serves`.

    Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1: 16
    products for what takes 36, forward and in both gradients. The result is channels last. The bits
    do not depend on the number of threads. Differentiable twice.
    """
    y: Tensor = torch.ops.fedkn_native.winograd(x, layer.weight, _lanes())
    return y


_MOST = 128
"""Channels up to which it was measured; all that is made of wider filters leaves the L2 cache."""


def _few(channels: int) -> bool:
    return channels % 8 == 0 and channels <= _MOST


@functools.cache
def _lanes() -> int:
    lanes: int = torch.ops.fedkn_native.winograd_lanes()
    return lanes
