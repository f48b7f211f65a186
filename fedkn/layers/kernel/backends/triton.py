"""How the Triton kernels are launched: `plain`'s forward and backward for CUDA devices.

Used for CUDA tensors where `fedkn.layers.triton_switch` allows it. With TRITON_INTERPRET=1 they run
on CPU tensors, for tests on machines without a device.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from fedkn.layers.circumstances import No, Served
from fedkn.layers.kernel.autograd import Saved
from fedkn.layers.kernel.definition import centred, filter_sums
from fedkn.layers.kernel.host_masks import LEVELS
from fedkn.layers.kernel.settings import Settings
from fedkn.layers.triton_switch import load

__all__ = ["backward", "forward", "load", "serves"]


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> Served:
    """Whether the kernels are wanted, can be had, and take these tensors: float32 or half."""
    if not (x.is_cuda or _interpreted()):
        return _ELSEWHERE
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return _DTYPE
    if not x.numel() or _pixel_strides(x) is None:
        return _UNEVEN
    return True if load() else _NONE


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, keep: bool
) -> tuple[Tensor, Saved | None]:
    """Do what `plain.forward` does."""
    from fedkn.layers.kernel.backends import triton_kernels as kernels  # noqa: PLC0415 - Triton is optional

    geometry = settings.geometry
    mean, scale = _statistics(x, settings, kernels)
    centres = settings.centres_filters
    z = _dense(
        torch.nn.functional.conv2d(x, centred(weight) if centres else weight, None, *geometry[1:])
    )
    keep_z = keep and not settings.one_map
    y = torch.empty_like(z) if keep_z else z
    filters, positions = z.shape[1], z.shape[2] * z.shape[3]
    block_o, block_p = _blocks(z)
    grid = (_cdiv(positions, block_p), _cdiv(filters, block_o), z.shape[0])
    kernels.epilogue[grid](
        z, y, mean, scale, _filters(weight), _bias(bias, weight),
        filters, positions, *_strides(z),
        CENTRED=centres, BIAS=bias is not None, RELU=settings.relu, KEEP_Z=keep_z,
        BLOCK_O=block_o, BLOCK_P=block_p,
    )  # fmt: skip
    return y, (Saved(z if keep_z else y, mean, scale, far=False) if keep else None)


def backward(
    g: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    saved: Saved,
    settings: Settings,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Do what `plain.backward` does."""
    from fedkn.layers.kernel.backends import triton_kernels as kernels  # noqa: PLC0415 - Triton is optional

    x, weight, bias = tensors
    output, mean, scale = saved[:3]
    geometry, centres = settings.geometry, settings.centres_filters
    g = _laid_out_as(g, output)
    dz = torch.empty_like(output)
    samples, filters, rows, columns = output.shape
    positions = rows * columns
    block_o, block_p = _blocks(output)
    tiles = _cdiv(positions, block_p)
    splits = _splits(samples * tiles, filters, block_o)
    maps = x.new_empty((splits, samples, 2, positions), dtype=torch.float32)
    sums = x.new_empty((samples * tiles, 2, filters), dtype=torch.float32)
    kernels.reduce_gradient[(tiles, samples, splits)](
        g, output, mean, scale, _filters(weight), _bias(bias, weight), dz, maps, sums,
        filters, positions, *_strides(output),
        CENTRED=centres, BIAS=bias is not None, RELU=settings.relu, OUTPUT=settings.one_map,
        SPLITS=splits, BLOCK_O=block_o, BLOCK_P=block_p,
    )  # fmt: skip
    db, dsum = sums.sum(0).unbind(0)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dz, x, centred(weight) if centres else weight, None, *geometry[1:4], False, [0, 0],
        geometry.groups, (wanted[0], wanted[1], False),
    )  # fmt: skip
    if wanted[1]:
        dw = centred(dw) if centres else dw.sub_(dsum.view(-1, 1, 1, 1))
    if wanted[0]:
        dx = _dense(dx)
        block_c, block_x = _blocks(x)
        pixels = x.shape[2] * x.shape[3]
        shares = _splits(samples * _cdiv(pixels, block_x), x.shape[1], block_c)
        kernels.add_through_statistics[(_cdiv(pixels, block_x), samples, shares)](
            x, dx, _key(settings), mean, scale, maps,
            *x.shape[1:], rows, columns, *_words(x, settings),
            settings.n, *_strides(x), *_strides(dx),
            **_taps(settings), **_masking(settings), ALIGNED=pixels % 4 == 0, SPLITS=splits,
            SHARES=shares, BLOCK_C=block_c, BLOCK_P=block_x,
        )  # fmt: skip
    return dx, dw, db.to(weight.dtype) if wanted[2] else None


_ELSEWHERE = No("the maps are on no CUDA device")
_DTYPE = No("it takes float32, bfloat16 or float16, the maps' dtype for the filters too")
_UNEVEN = No("there are no maps, or their pixels are not evenly spaced in memory")
_NONE = No("the Triton kernels cannot be had: FEDKN_TRITON=0, or Triton is not installed")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROGRAMS = 512  # enough to keep every multiprocessor busy


def _statistics(x: Tensor, settings: Settings, kernels: Any) -> tuple[Tensor, Tensor]:
    kernel, stride, padding, dilation, _ = settings.geometry
    samples, channels, height, width = x.shape
    rows, columns = (
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in range(2)
    )
    pixels = height * width
    block_c, block_p = _blocks(x)
    tiles = _cdiv(pixels, block_p)
    splits = _splits(samples * tiles, channels, block_c)
    sums = x.new_empty((splits, samples, 2, pixels), dtype=torch.float64)
    kernels.channel_sums[(tiles, samples, splits)](
        x, _key(settings), sums, channels, pixels, *_words(x, settings), *_strides(x),
        **_masking(settings), ALIGNED=pixels % 4 == 0, SPLITS=splits,
        BLOCK_C=block_c, BLOCK_P=block_p,
    )  # fmt: skip
    mean = x.new_empty((samples, 1, rows, columns), dtype=torch.float32)
    scale = torch.empty_like(mean)
    kernels.moments[(_cdiv(rows * columns, _TILE), samples)](
        sums, mean, scale, height, width, columns, rows * columns,
        settings.n, settings.level, settings.eps,
        **_taps(settings), MASKED=settings.key is not None, SPLITS=splits, BLOCK_P=_TILE,
    )  # fmt: skip
    return mean, scale


_TILE = 128


def _blocks(x: Tensor) -> tuple[int, int]:
    """Channels and pixels of a tile: long in the direction in which memory is contiguous."""
    return (32, 32) if x.stride(1) == 1 and x.shape[1] > 1 else (8, _TILE)


def _splits(programs: int, channels: int, block: int) -> int:
    """Into how many shares the channels are cut, where the pixels alone make few programs."""
    return max(1, min(_cdiv(channels, block), _PROGRAMS // max(programs, 1), 16))


def _taps(settings: Settings) -> dict[str, int]:
    names = ("K", "S", "P", "D")
    sizes = zip(names, settings.geometry[:4], strict=True)
    return {name + axis: size[d] for name, size in sizes for d, axis in enumerate("HW")}


def _words(x: Tensor, settings: Settings) -> tuple[int, int]:
    return _cdiv(x[0].numel(), 4), settings.level


def _key(settings: Settings) -> int | Tensor:
    return 0 if settings.key is None else settings.key


def _masking(settings: Settings) -> dict[str, bool]:
    key = settings.key
    return {"MASKED": key is not None, "POINTER": isinstance(key, Tensor)}


def _filters(weight: Tensor) -> Tensor:
    return filter_sums(weight.float()).flatten()


def _bias(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight if bias is None else bias  # a pointer that is not read


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _pixel_strides(x: Tensor) -> tuple[int, int, int] | None:
    """Sample, channel and pixel strides; None where the pixels are not evenly spaced."""
    stride_n, stride_c, stride_h, stride_w = x.stride()
    even = x.shape[2] == 1 or x.shape[3] == 1 or stride_h == stride_w * x.shape[3]
    return (stride_n, stride_c, stride_w if x.shape[3] > 1 else stride_h) if even else None


def _strides(x: Tensor) -> tuple[int, int, int]:
    strides = _pixel_strides(x)
    assert strides is not None
    return strides


def _dense(x: Tensor) -> Tensor:
    return x if _pixel_strides(x) is not None else x.contiguous()


def _laid_out_as(g: Tensor, like: Tensor) -> Tensor:
    if g.stride() == like.stride():
        return g
    return torch.empty_like(like).copy_(g)


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


assert LEVELS == 1 << 16, "the kernels take lanes of 16 bits"
