"""GroupNorm, the ReLU after it and max-pooling in one kernel.

Of clients under a vmap it is one kernel for all: on the CPU a native one, on a GPU Triton's
(`fedkn.layers.group_norm_kernels`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedkn.layers import circumstances, side_by_side, triton_switch
from fedkn.layers.map_layout import fits, in_one_piece, laid_out_as, maps_of
from fedkn.layers.native import library
from fedkn.layers.triton_launch import launch

__all__ = ["group_norm", "pools", "serves"]


def serves(x: object, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `group_norm` takes these: float32 maps on the CPU, eager or of clients under vmap.

    And clients' maps on a GPU. It needs a weight and a bias, and the kernels; the native ones are
    built by the first call.
    """
    if not isinstance(x, Tensor) or weight is None or bias is None:
        return False
    if x.dim() != 4 or x.numel() == 0:
        return False
    if not circumstances.eager():
        if not circumstances.one_vmap_over(weight):
            return False
        if triton_switch.reaches(x.device):
            return _triton_takes(x, weight, bias)
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
    """All clients' groups at once."""
    clients = side_by_side.clients_of(weight)
    if triton_switch.reaches(x.device):
        with side_by_side.outside():
            maps, gain, shift = (
                side_by_side.taken_out(tensor, 0, clients) for tensor in (x, weight, bias)
            )
            y = _Normalized.apply(maps, groups, gain.contiguous(), shift.contiguous(), eps, relu)  # type: ignore[no-untyped-call] # torch's
        return side_by_side.put_back(y, 0)
    maps = side_by_side.beside(x, clients)
    gain, shift = side_by_side.flat(weight, clients), side_by_side.flat(bias, clients)
    with side_by_side.outside():
        y = torch.ops.fedkn_native.group_norm(maps, clients * groups, gain, shift, eps, relu, False)
    return side_by_side.apart(y, clients)


def _triton_takes(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return (
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.device == weight.device == bias.device
        and fits(x, side_by_side.clients_of(weight))
        and not torch.is_autocast_enabled(x.device.type)
        and triton_switch.load()
    )


class _Normalized(torch.autograd.Function):
    """Of maps (K, N, C, H, W) by gains and shifts (K, C)."""

    @staticmethod
    def forward(  # noqa: PLR0917 - the arguments of autograd functions have no names
        ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, relu: bool
    ) -> Tensor:
        from fedkn.layers import group_norm_kernels as kernels  # noqa: PLC0415 - Triton is optional

        x = in_one_piece(x)
        y, maps = torch.empty_like(x), maps_of(x)
        mean = x.new_empty((maps.all, groups), dtype=torch.float32)
        scale = torch.empty_like(mean)
        each = maps.channels // groups
        launch(
            kernels.normalize, (groups, maps.all),
            x, y, weight, bias, mean, scale, maps.samples, each, maps.pixels, eps, *maps.strides,
            RELU=relu, **maps.group_blocks(each),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.relu = relu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        from fedkn.layers import group_norm_kernels as kernels  # noqa: PLC0415 - Triton is optional

        x, weight, bias, mean, scale = ctx.saved_tensors
        maps, groups = maps_of(x), mean.shape[1]
        each = maps.channels // groups
        dx = torch.empty_like(x)
        parts = mean.new_empty((maps.clients, maps.samples, 2, maps.channels))
        launch(
            kernels.normalize_back, (groups, maps.all),
            laid_out_as(g, x), x, weight, bias, mean, scale, dx, parts,
            maps.samples, each, maps.pixels, *maps.strides,
            RELU=ctx.relu, **maps.group_blocks(each),
        )  # fmt: skip
        dgain, dshift = parts.sum(1).unbind(1)
        return dx, None, dgain.to(weight.dtype), dshift.to(bias.dtype), None, None
