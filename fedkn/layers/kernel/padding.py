"""Sizes and paddings as a user may write them, brought to one form; and where windows lie."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.errors import UserError, unknown_name
from fedkn.layers.kernel.settings import Geometry

__all__ = ["PADDING_MODES", "Padding", "Size", "edges", "place", "size", "windows"]

Size = int | Sequence[int]
Padding = int | Sequence[int]
PADDING_MODES = ("zeros", "reflect", "replicate")

_TORCH_MODES = {"reflect": "reflect", "replicate": "replicate"}


def size(name: str, value: Size, dims: int, minimum: int = 1) -> tuple[int, ...]:
    """Return `value` as one int per spatial dimension.

    Raises UserError if it is neither an int nor `dims` ints, or if one is below `minimum`.
    """
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or not all(isinstance(v, int) and v >= minimum for v in values):
        raise UserError(
            f"{name} is {value!r}: give an int or {dims} ints of at least {minimum}"
            if dims > 1
            else f"{name} is {value!r}: give an int of at least {minimum}"
        )
    return values


def edges(value: Padding, dims: int) -> tuple[int, ...]:
    """Return a padding as (left, right, top, bottom), or (left, right) for one dimension.

    `value` is an int (all sides), for two dimensions a pair (height, width) as PyTorch reads it,
    or one int per side: (left, right, top, bottom) for two dimensions, (left, right) for one.

    Raises UserError for anything else and for negative paddings.
    """
    if isinstance(value, int):
        values: tuple[int, ...] = (value,) * (2 * dims)
    else:
        values = tuple(value)
        if dims == 2 and len(values) == 2:
            values = (values[1], values[1], values[0], values[0])
        elif len(values) == 1:
            values = values * (2 * dims)
    if len(values) != 2 * dims or not all(isinstance(v, int) and v >= 0 for v in values):
        forms = "(height, width) or (left, right, top, bottom)" if dims == 2 else "or (left, right)"
        raise UserError(f"padding is {value!r}: give a non-negative int, {forms}")
    return values


def place(  # noqa: PLR0917 - in conv2d's order
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    sides: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str,
) -> tuple[Tensor, Geometry]:
    """Return x as (N, C, H, W), padded where a convolution cannot, and where its units lie.

    `x` is (N, C, H, W), or (N, C, L) with one-dimensional windows; `sides` as `edges` returns them.

    Raises UserError where they do not fit each other.
    """
    dims = len(kernel)
    if x.dim() != dims + 2:
        shape = "(N, C, H, W)" if dims == 2 else "(N, C, L)"
        raise UserError(f"KNConv takes {shape}, not {tuple(x.shape)}: add the batch dimension")
    # Compilers trace what is asked of the cache, and warn.
    plan = _plan.__wrapped__ if torch.compiler.is_compiling() else _plan
    sides, geometry = plan(kernel, stride, sides, dilation, groups, padding_mode)
    return _pad(x if dims == 2 else x.unsqueeze(2), sides, padding_mode), geometry


def windows(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    sides: tuple[int, ...],
    padding_mode: str,
) -> Tensor:
    """Return the windows of x, (N, C, H, W), laid side by side: (N, C, OH * KH, OW * KW).

    Raises UserError where they do not fit each other.
    """
    if x.dim() != 4:
        raise UserError(
            f"kernel_norm takes (N, C, H, W), not {tuple(x.shape)}: add the batch dimension"
        )
    x = _pad(x, sides, padding_mode)
    zeros_h, zeros_w = _zeros_left(sides, padding_mode)
    if zeros_h or zeros_w:
        x = F.pad(x, (zeros_w, zeros_w, zeros_h, zeros_h))
    samples, channels, height, width = x.shape
    if height < kernel[0] or width < kernel[1]:
        raise UserError(f"kernel {kernel} is larger than the padded {height}x{width} input")
    if kernel == (1, 1) and stride == (1, 1):
        return x
    unfolded = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    rows, columns = unfolded.shape[2:4]
    return unfolded.permute(0, 1, 2, 4, 3, 5).reshape(
        samples, channels, rows * kernel[0], columns * kernel[1]
    )


@functools.lru_cache
def _plan(  # noqa: PLR0917 - positional, which the cache hashes fastest
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    sides: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str,
) -> tuple[tuple[int, ...], Geometry]:
    """Return the four sides' padding, and the geometry of what is left to the convolution."""
    if len(kernel) == 1:
        sides = (*sides, 0, 0)
    lines = (1,) * (2 - len(kernel))
    (kernel_h, kernel_w), (stride_h, stride_w), (dilation_h, dilation_w) = (
        (*lines, *sizes) for sizes in (kernel, stride, dilation)
    )
    geometry = Geometry(
        kernel=(kernel_h, kernel_w),
        stride=(stride_h, stride_w),
        padding=_zeros_left(sides, padding_mode),
        dilation=(dilation_h, dilation_w),
        groups=groups,
    )
    return sides, geometry


def _zeros_left(sides: tuple[int, ...], mode: str) -> tuple[int, int]:
    """Return the zero padding, (height, width), that `_pad` leaves for the convolution to apply."""
    left, right, top, bottom = sides
    symmetric = mode == "zeros" and left == right and top == bottom
    return (top, left) if symmetric else (0, 0)


def _pad(x: Tensor, sides: tuple[int, ...], mode: str) -> Tensor:
    """Pad what a convolution cannot pad itself: all but zeros alike on opposite sides.

    `x` is (N, C, H, W), `sides` is (left, right, top, bottom); see `_zeros_left`.

    Raises UserError for an unknown mode or a reflection wider than the input.
    """
    left, right, top, bottom = sides
    if mode == "zeros":
        return x if left == right and top == bottom else F.pad(x, sides)
    if mode not in _TORCH_MODES:
        raise unknown_name("padding mode", mode, PADDING_MODES)
    if not any(sides):
        return x
    if mode == "reflect" and (max(left, right) >= x.shape[3] or max(top, bottom) >= x.shape[2]):
        raise UserError(
            f"reflect padding {sides} is not smaller than the {x.shape[2]}x{x.shape[3]} input: "
            "use a smaller padding or padding_mode='zeros'"
        )
    return F.pad(x, sides, mode=_TORCH_MODES[mode])
