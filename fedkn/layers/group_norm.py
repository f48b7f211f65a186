"""GroupNorm, the ReLU after it and max-pooling in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkn.layers import circumstances, side_by_side
from fedkn.layers.native import library

__all__ = ["group_norm", "pools", "serves"]


def serves(x: object, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `group_norm` takes these: float32 maps on the CPU, eager or of clients under vmap.

    It needs a weight and a bias, and the native kernels, which the first call may build.
    """
    if not isinstance(x, Tensor) or weight is None or bias is None:
        return False
    if x.dim() != 4 or x.numel() == 0:
        return False
    if not circumstances.eager():
        return bool(side_by_side.serves(x, weight, bias))
    return not torch.is_autocast_enabled("cpu") and bool(library.serves(x, weight, bias))


def pools(x: Tensor) -> bool:
    """Whether `group_norm` can pool x: eager, channels last in eights, and with even sides."""
    return (
        circumstances.eager()
        and not (x.shape[1] % 8 or x.shape[2] % 2 or x.shape[3] % 2)
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def group_norm(  # noqa: PLR0917 - in group_norm's order
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    pool: bool = False,
) -> Tensor:
    """`torch.nn.functional.group_norm` of x (N, C, H, W), then ReLU if `relu`: equal to rounding.

    Only for what it `serves`. Sums are in double, so that no mean is too far from zero for it.
    Differentiable twice, but for clients under vmap.

    With `pool` 2x2 max-pooling follows, (N, C, H / 2, W / 2), only for what it `pools`. The map
    before the pooling is never written, which saves its memory and half of the time or more.
    """
    if not circumstances.eager():
        return _of_clients(x, groups, weight, bias, eps, relu)
    y: Tensor = torch.ops.fedkn_native.group_norm(x, groups, weight, bias, eps, relu, pool)
    return y


def _of_clients(  # noqa: PLR0917 - as group_norm's
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> Tensor:
    """All clients' groups beside each other."""
    clients = side_by_side.clients_of(weight)
    maps = side_by_side.beside(x, clients)
    gain, shift = side_by_side.flat(weight, clients), side_by_side.flat(bias, clients)
    with side_by_side.outside():
        y: Tensor = torch.ops.fedkn_native.group_norm(
            maps, clients * groups, gain, shift, eps, relu, False
        )
    return side_by_side.apart(y, clients)
