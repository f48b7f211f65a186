"""2x2 max-pooling with stride 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.layers import mapped, native
from fedkn.layers.autograd import plain_tensors

__all__ = ["max_pool", "serves"]


def max_pool(x: Tensor) -> Tensor:
    """`torch.nn.functional.max_pool2d(x, 2)`: (N, C, H, W) to (N, C, H // 2, W // 2).

    Float32 maps on the CPU, eager or of clients under vmap, take `native`'s kernel, which gives the
    same numbers and the same gradients; where a window holds its largest number twice the first
    one gets the gradient.
    """
    if not serves(x):
        return F.max_pool2d(x, 2)
    y: Tensor = torch.ops.fedkn_native.max_pool(x) if plain_tensors() else mapped.max_pool(x)
    return y


def serves(x: Tensor) -> bool:
    """Whether the kernel takes `x`."""
    if x.dim() != 4 or min(x.shape[-2:]) < 2 or x.numel() == 0:
        return False
    return native.serves(x, x, None) if plain_tensors() else mapped.serves(x, x, None)
