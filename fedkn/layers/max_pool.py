"""2x2 max-pooling with stride 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.layers import circumstances, side_by_side
from fedkn.layers.native import library

__all__ = ["max_pool", "serves"]


def max_pool(x: Tensor) -> Tensor:
    """`torch.nn.functional.max_pool2d(x, 2)`: (N, C, H, W) to (N, C, H // 2, W // 2).

    Float32 maps on the CPU, eager or of clients under vmap, take a native kernel, which gives the
    same numbers and the same gradients; where a window holds its largest number twice the first
    one gets the gradient.
    """
    if not serves(x):
        return F.max_pool2d(x, 2)
    if not circumstances.eager():
        return _of_clients(x)
    y: Tensor = torch.ops.fedkn_native.max_pool(x)
    return y


def serves(x: Tensor) -> bool:
    """Whether the kernel takes `x`."""
    if x.dim() != 4 or min(x.shape[-2:]) < 2 or x.numel() == 0:
        return False
    if not circumstances.eager():
        return bool(side_by_side.serves(x, x, None))
    return bool(library.serves(x, x, None))


def _of_clients(x: Tensor) -> Tensor:
    """All clients' maps beside each other."""
    clients = side_by_side.clients_of(x)
    maps = side_by_side.beside(x, clients)
    with side_by_side.outside():
        y: Tensor = torch.ops.fedkn_native.max_pool(maps)
    return side_by_side.apart(y, clients)
