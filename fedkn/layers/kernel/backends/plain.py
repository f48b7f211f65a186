"""The kernel-normalized convolution and its gradients by hand, in torch operations.

Kept for the backward pass are x, which a convolution keeps anyway, one output map and two maps of
one value per position; of the mask its bits, or on other devices than the CPU nothing but its key,
from which it is drawn again. With r = 1/(1-p), B the box filter
and S the filters' sums, the equations are

    z = conv(x, w) - mean * S,   s = 1/sqrt(var + eps),   y = z * s + b
    dz = g * s,   db = sum g,   dw = convW(dz, x) - sum(dz * mean)
    dvar = -s^2/2 * sum_o dz * z,   dmean = -sum_o dz * S
    dx = convT(dz, w) + mask * B'(r/n * (dmean - 2 * dvar * mean) + 2 r^2/n * dvar * x)
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.layers.kernel.autograd import Saved
from fedkn.layers.kernel.definition import centred, filter_sums
from fedkn.layers.kernel.dropout import draw_mask, keep_mask_and_bits, mask_of_bits
from fedkn.layers.kernel.dtypes import cast, wide
from fedkn.layers.kernel.settings import Settings
from fedkn.layers.kernel.statistics import (
    box_quickly,
    moment_weights,
    statistics,
    unbox_quickly,
)

__all__ = [
    "UnitStatistics",
    "add_through_statistics",
    "backward",
    "forward",
    "serves",
    "unit_statistics",
]


class UnitStatistics(NamedTuple):
    """Of each unit, (N, 1, OH, OW), and what their derivatives need; see `Saved`."""

    mean: Tensor
    scale: Tensor
    """1/sqrt(var + eps)."""
    far: bool
    bits: Tensor | None


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> Literal[True]:
    """Whatever the tensors are."""
    return True


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, keep: bool
) -> tuple[Tensor, Saved | None]:
    """Return the output and, if `keep`, what `backward` needs. Arguments as in `definition`."""
    dtype = wide(x.dtype)
    mean, scale, far, bits = unit_statistics(cast(x, dtype), settings, keep)
    sums = None
    if settings.centres_filters:
        z = cast(F.conv2d(x, centred(weight), None, *settings.geometry[1:]), dtype)
    else:
        z = cast(F.conv2d(x, weight, None, *settings.geometry[1:]), dtype)
        sums = filter_sums(cast(weight, dtype))
        z.addcmul_(mean, sums, value=-1)
    in_place = settings.one_map or not keep
    shift = None if bias is None else _per_channel(bias, dtype)
    if shift is None:
        y = z.mul_(scale) if in_place else z * scale
    else:
        y = torch.addcmul(shift, z, scale, out=z) if in_place else torch.addcmul(shift, z, scale)
    if settings.relu:
        y.relu_()
    y = cast(y, x.dtype)
    if not keep:
        return y, None
    return y, Saved(y if settings.one_map else cast(z, x.dtype), mean, scale, far, sums, bits)


def backward(
    g: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    saved: Saved,
    settings: Settings,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of (x, weight, bias), None where not `wanted`, for the output's `g`."""
    x, weight, bias = tensors
    output, mean, scale, far, sums, bits, _ = saved
    _, stride, padding, dilation, groups = settings.geometry
    dtype = wide(x.dtype)
    if settings.relu:
        g = torch.ops.aten.threshold_backward(g, output, 0)
    g = cast(g, dtype)
    dz = g * scale
    dsum = _sum_of_products(dz, mean) if wanted[1] and sums is not None else None
    used = centred(weight) if sums is None else weight
    dx, dw, _ = torch.ops.aten.convolution_backward(
        cast(dz, x.dtype), x, used, None, stride, padding, dilation, False, [0, 0], groups,
        (wanted[0], wanted[1], False),
    )  # fmt: skip
    if wanted[1]:
        dw = centred(dw) if dsum is None else dw.sub_(dsum.view(-1, 1, 1, 1))
    db = g.sum((0, 2, 3)) if wanted[2] else None
    if wanted[0]:
        against = None if sums is None else _weighted_sum(dz, sums)
        # dz is needed no more: its memory takes dz * z.
        if not settings.one_map:
            dz.mul_(output)
        elif bias is None:
            torch.mul(g, output, out=dz)
        else:
            # It is g * (y - b): where ReLU made y zero, g is zero too.
            torch.sub(cast(output, dtype), _per_channel(bias, dtype), out=dz).mul_(g)
        # -2 * dvar, a map of one value per position
        curvature = dz.sum(1, keepdim=True).mul_(scale).mul_(scale)
        add_through_statistics(dx, x, (mean, against, curvature), settings, far, bits)
    return dx, dw, db


def unit_statistics(x: Tensor, settings: Settings, keep: bool) -> UnitStatistics:
    """Do what `statistics` does, in half the passes where no mean is far from zero.

    Whether one is far is not asked beyond the CPU, where to know would cost a wait: it is taken to
    be so. `x` is of the statistics' dtype; the mask is drawn here. `keep`: `add_through_statistics`
    will be called.
    """
    mask, bits = _draw(x, settings, keep)
    if x.device.type == "cpu":
        # In the mask's place: the rare case that needs it again has to make it again.
        dropped = x if mask is None else mask.mul_(x)
        sums = dropped.sum(1, keepdim=True)
        squares = dropped * dropped if mask is None else dropped.mul_(dropped)
        n = settings.n
        first, second = moment_weights(n, settings.level, mask is not None)
        both = torch.cat((sums, squares.sum(1, keepdim=True)))
        mean, square = box_quickly(both, settings.geometry, first).chunk(2)
        # By calls that take a factor along: one with a number of its own costs twice as much.
        ratio = second / first
        # What is kept must not be what such a mode makes of a tensor.
        scalar = _scalar.__wrapped__ if torch._C._len_torch_dispatch_stack() else _scalar
        scale = torch.add(scalar(settings.eps, x.dtype), square, alpha=ratio, out=square)
        # Not far: mean^2 <= 32 (var + eps). A nan is; an empty batch has no minimum.
        excess = torch.addcmul(scale, mean, mean, value=-33 / 32)
        if not excess.numel() or excess.min().item() >= 0.0:
            scale.addcmul_(mean, mean, value=-1).rsqrt_()
            return UnitStatistics(mean, scale, False, bits)
        mask = _draw(x, settings, False)[0]
    mean, variance = statistics(x, mask, settings.level, settings.geometry)
    return UnitStatistics(mean, variance.add_(settings.eps).rsqrt_(), True, bits)


def add_through_statistics(  # noqa: PLR0917 - what the forward pass kept comes last
    dx: Tensor,
    x: Tensor,
    maps: tuple[Tensor, Tensor | None, Tensor],
    settings: Settings,
    far: bool,
    bits: Tensor | None = None,
) -> None:
    """Add to `dx` what reaches x through `maps`: the mean, -dmean (None for 0), and -2 * dvar."""
    dtype = wide(x.dtype)
    if far:
        maps = tuple(m if m is None else m.double() for m in maps)  # type: ignore[assignment] # same length
    mean, against, curvature = maps
    if against is None:
        offset = torch.mul(curvature, mean).neg_()
    else:
        offset = torch.addcmul(against, curvature, mean, value=-1)
    size = (x.shape[2], x.shape[3])
    offset, slope = unbox_quickly(torch.cat((offset, curvature)), size, settings.geometry).chunk(2)
    # -first * offset - second * slope * x, but for a factor that the last step brings.
    n = settings.n
    first, second = moment_weights(n, settings.level, settings.key is not None)
    values, ratio = cast(x, dtype), second / first
    if far:
        # About each pixel's mean: else the two cancel.
        shift = values.mean(1, keepdim=True)
        offset = torch.addcmul(offset, slope, shift.double(), value=ratio).to(dtype)
        slope, values = slope.to(dtype), values - shift
    values = torch.addcmul(offset, values, slope, value=ratio)
    if bits is None:
        mask = _draw(x, settings, False)[0]
    else:
        mask = _laid_out_as(x, mask_of_bits(bits, x.shape, dtype))
    if mask is None:
        dx.add_(values, alpha=-first)
    elif dx.dtype == values.dtype:
        dx.addcmul_(values, mask, value=-first)
    else:
        dx.add_(values.mul_(mask), alpha=-first)


def _draw(x: Tensor, settings: Settings, packed: bool) -> tuple[Tensor | None, Tensor | None]:
    """The mask for `x` in the statistics' dtype, and its bits if `packed` and worth it."""
    key = settings.key
    if packed and isinstance(key, int) and x.device.type == "cpu":
        mask, bits = keep_mask_and_bits(key, x.shape, settings.level, wide(x.dtype))
        return _laid_out_as(x, mask), bits
    return _laid_out_as(x, draw_mask(x, settings)), None


@functools.lru_cache(maxsize=64)
def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def _per_channel(bias: Tensor, dtype: torch.dtype) -> Tensor:
    return cast(bias, dtype).view(1, -1, 1, 1)


def _laid_out_as(x: Tensor, mask: Tensor | None) -> Tensor | None:
    # The generator counts in (N, C, H, W) order whatever the layout of x in memory.
    if mask is None or x.is_contiguous() or not _channels_last(x):
        return mask
    return mask.contiguous(memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _weighted_sum(maps: Tensor, weights: Tensor) -> Tensor:
    """Sum (N, O, OH, OW) over O with one weight each: (N, 1, OH, OW). One pass, no temporary."""
    if _channels_last(maps):
        return (maps.permute(0, 2, 3, 1) @ weights.view(-1)).unsqueeze(1)
    samples, channels, *size = maps.shape
    row = weights.view(1, 1, channels).expand(samples, 1, channels)
    return torch.bmm(row, maps.flatten(2)).view(samples, 1, *size)


def _sum_of_products(maps: Tensor, position: Tensor) -> Tensor:
    """Sum (N, O, OH, OW) times (N, 1, OH, OW) over samples and positions: (O,)."""
    if _channels_last(maps):
        rows = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
        return position.reshape(-1) @ rows
    return (maps * position).sum((0, 2, 3))
