"""2x2 max-pooling with stride 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.layers import native
from fedkn.layers.autograd import plain_tensors

__all__ = ["max_pool"]


def max_pool(x: Tensor) -> Tensor:
    """`torch.nn.functional.max_pool2d(x, 2)`: (N, C, H, W) to (N, C, H // 2, W // 2).

    Eager float32 maps on the CPU take `native`'s kernel, which gives the same numbers and the same
    gradients; where a window holds its largest number twice the first one gets the gradient.
    """
    if serves(x):
        y: Tensor = torch.ops.fedkn_native.max_pool(x)
        return y
    return F.max_pool2d(x, 2)


def serves(x: Tensor) -> bool:
    """Whether the kernel takes `x`."""
    return (
        plain_tensors()
        and x.dim() == 4
        and min(x.shape[-2:]) >= 2
        and x.numel() > 0
        and native.serves(x, x, None)
    )
