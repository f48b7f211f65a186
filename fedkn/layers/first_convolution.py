"""The 3x3 convolution of images, which have few channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedkn.layers.plain_convolution import plain

__all__ = ["first_convolution", "serves"]


def serves(layer: nn.Conv2d, x: object) -> bool:
    """Whether `first_convolution` takes these.

    A plain 3x3 convolution with padding 1, of one to four channels to a multiple of
    eight, applied to eager float32 images on the CPU, channels last, whose gradient nobody wants.
    """
    return (
        layer.in_channels <= 4
        and layer.out_channels % 8 == 0
        and plain(x, layer)
        and not x.requires_grad
    )


def first_convolution(layer: nn.Conv2d, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return x convolved as by the layer, (N, C, H, W) to (N, O, H, W); only what it `serves`.

    Without the layer's bias, by `weight` in place of its own where it is given, equal to rounding.

    PyTorch's convolutions fill their vectors with channels; this one does with filters. The result
    is laid out channels last, also for grey images, in which both layouts are one.
    Differentiable twice.
    """
    used = layer.weight if weight is None else weight
    y: Tensor = torch.ops.fedkn_native.first_convolution(x, used)
    return y
