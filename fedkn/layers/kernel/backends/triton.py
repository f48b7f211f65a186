"""How the Triton kernels are launched: `plain`'s forward and backward for CUDA devices.

Used for tensors that `fedkn.layers.triton_switch` reaches and allows it for. Around the convolution
itself a forward pass is three launches, a backward pass two.

Several clients' tensors are one more dimension: maps (K, N, C, H, W), filters (K, O, C/groups, KH,
KW), biases (K, O) and keys (K,), as `fedkn.layers.kernel.backends.vmap` has them.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.layers import stacked_convolution, triton_switch
from fedkn.layers.circumstances import No, Served
from fedkn.layers.kernel.autograd import Saved
from fedkn.layers.kernel.host_masks import LEVELS
from fedkn.layers.kernel.settings import Settings
from fedkn.layers.kernel.statistics import moment_weights
from fedkn.layers.map_layout import MOST, Maps, cdiv, dense, fits, laid_out_as, maps_of
from fedkn.layers.triton_launch import launch
from fedkn.layers.triton_switch import load

__all__ = ["backward", "forward", "load", "norm", "norm_gradient", "serves", "takes"]


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> Served:
    """Whether the kernels are wanted, can be had, and take these tensors: float32 or half."""
    served = takes(x, weight)
    if served and Maps.of(x) is None:
        return _UNEVEN
    return served


def takes(x: Tensor, weight: Tensor, clients: int = 1) -> Served:
    """Say what `serves` does, of maps of each of so many clients, however they lie in memory."""
    if not triton_switch.reaches(x.device):
        return _ELSEWHERE
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return _DTYPE
    if not x.numel():
        return _UNEVEN
    if not fits(x, clients):
        return _MANY
    return True if load() else _NONE


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, keep: bool
) -> tuple[Tensor, Saved | None]:
    """Do what `plain.forward` does."""
    units, used = _statistics(x, weight, settings)
    z = dense(_convolved(x, used, settings))
    keep_z = keep and not settings.one_map
    y = torch.empty_like(z) if keep_z else z
    _epilogue(z, y, units, bias, settings.relu, keep_z=keep_z, centred=settings.centres_filters)
    if not keep:
        return y, None
    mean, scale, sums = units
    return y, Saved(z if keep_z else y, mean, scale, far=False, sums=sums, filters=used)


def backward(
    g: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    saved: Saved,
    settings: Settings,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Do what `plain.backward` does."""
    x, weight, bias = tensors
    assert saved.sums is not None
    assert saved.filters is not None
    units = _Units(saved.mean, saved.scale, saved.sums)
    dz, through, parts = _reduced(
        g, saved.output, units, bias, settings.relu,
        output=settings.one_map, centred=settings.centres_filters,
    )  # fmt: skip
    dx, dw = _convolution_gradients(dz, x, saved.filters, settings, wanted)
    db = bias.new_empty(bias.shape) if bias is not None and wanted[2] else None
    own = None if dw is None else torch.empty_like(_dense_filters(weight))
    _finish(x, dx, units, through, parts, (dw, own, db), saved.output, settings)
    return dx, own, db


def norm(x: Tensor, settings: Settings) -> tuple[Tensor, _Units]:
    """Return KernelNorm of `x`, whose windows are single pixels, and what `norm_gradient` needs.

    It is the convolution by filters that leave maps as they are.
    """
    units, _ = _statistics(x, None, settings)
    y = torch.empty_like(x)
    _epilogue(x, y, units, None, relu=False, keep_z=False, centred=False)
    return y, units


def norm_gradient(
    g: Tensor, x: Tensor, y: Tensor, units: tuple[Tensor, Tensor, Tensor], settings: Settings
) -> Tensor:
    """Return the gradient of `norm`'s `x` for its result's `g`."""
    units = _Units(*units)
    dx, through, parts = _reduced(g, y, units, None, relu=False, output=True, centred=False)
    _finish(x, dx, units, through, parts, (None, None, None), y, settings)
    return dx


_ELSEWHERE = No("the maps are on no CUDA device")
_DTYPE = No("it takes float32, bfloat16 or float16, the maps' dtype for the filters too")
_UNEVEN = No("there are no maps, or their pixels are not evenly spaced in memory")
_MANY = No(f"all clients' samples together are more than a launch's {MOST} rows")
_NONE = No("the Triton kernels cannot be had: FEDKN_TRITON=0, or Triton is not installed")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PROGRAMS = 512  # enough to keep every multiprocessor busy
_POSITIONS = 128  # of a tile of maps with one value for each


def _kernels() -> ModuleType:
    from fedkn.layers.kernel.backends import triton_kernels  # noqa: PLC0415 - Triton is optional

    return triton_kernels


class _Units(NamedTuple):
    """Mean and 1/sqrt(var + eps) of units (K * N, positions), and the filters' sums (K * O,)."""

    mean: Tensor
    scale: Tensor
    sums: Tensor


def _statistics(x: Tensor, weight: Tensor | None, settings: Settings) -> tuple[_Units, Tensor]:
    """Return the units' statistics, and the filters as they convolve; sums of one without."""
    kernels = _kernels()
    kernel, stride, padding, dilation, _ = settings.geometry
    maps = maps_of(x)
    rows, columns = (
        (maps.size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in range(2)
    )
    block_c, block_q = maps.tile()
    tiles = cdiv(cdiv(maps.pixels, 4), block_q)
    splits = _splits(maps.all * tiles, maps.channels, block_c)
    sums = x.new_empty((splits, 3, maps.all, maps.pixels), dtype=torch.float32)
    launch(
        kernels.channel_sums, (tiles, maps.all, splits),
        x, _key(settings), sums, maps.samples, maps.channels, maps.pixels,
        *_words(maps, settings), _key_stride(settings), *maps.strides,
        **_masking(settings), ALIGNED=maps.pixels % 4 == 0, QUADS=maps.quads(x),
        SPLITS=splits, BLOCK_C=block_c, BLOCK_Q=block_q,
    )  # fmt: skip
    taps, centres = 1, weight is not None and settings.centres_filters
    if weight is None:
        filters = used = weight = x.new_ones(maps.clients * maps.channels, dtype=torch.float32)
        programs = 0
    else:
        used = weight = _dense_filters(weight)
        if weight.dim() == 5 and stacked_convolution.grouped(x, settings.geometry):
            used, taps = stacked_convolution.room_for_filters(weight), kernel[0] * kernel[1]
        elif centres:
            used = torch.empty_like(weight)
        filters = weight.new_empty(weight.shape[:-3].numel(), dtype=torch.float32)
        programs = len(filters)
    mean = x.new_empty((maps.all, rows * columns), dtype=torch.float32)
    scale = torch.empty_like(mean)
    programs += cdiv(rows * columns, _POSITIONS) * maps.all
    launch(
        kernels.moments, (programs,),
        sums, mean, scale, weight, used, filters,
        maps.all, *maps.size, columns, rows * columns,
        settings.n, *_moment_weights(settings), settings.eps, weight.numel() // len(filters),
        **_taps(settings), MASKED=settings.key is not None, CENTRED=centres,
        COPY=used is not weight, TAPS=taps, SPLITS=splits, BLOCK=_POSITIONS,
    )  # fmt: skip
    return _Units(mean, scale, filters), used


def _epilogue(
    z: Tensor,
    y: Tensor,
    units: _Units,
    bias: Tensor | None,
    relu: bool,
    *,
    keep_z: bool,
    centred: bool,
) -> None:
    maps = maps_of(z)
    block_o, block_p = maps.blocks()
    grid = (cdiv(maps.pixels, block_p), cdiv(maps.channels, block_o), maps.all)
    launch(
        _kernels().epilogue, grid,
        z, y, *units, _pointer(bias, z),
        maps.samples, maps.channels, maps.pixels, *maps.strides,
        CENTRED=centred, BIAS=bias is not None, RELU=relu, KEEP_Z=keep_z,
        BLOCK_O=block_o, BLOCK_P=block_p,
    )  # fmt: skip


def _reduced(
    g: Tensor,
    kept: Tensor,
    units: _Units,
    bias: Tensor | None,
    relu: bool,
    *,
    output: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz, and `reduce_gradient`'s maps and parts; `kept` is y where `output`, else z."""
    dz, maps = torch.empty_like(kept), maps_of(kept)
    block_o, block_p = maps.blocks()
    tiles = cdiv(maps.pixels, block_p)
    splits = _splits(maps.all * tiles, maps.channels, block_o)
    through = kept.new_empty((splits, 2, maps.all, maps.pixels), dtype=torch.float32)
    parts = kept.new_empty((maps.all, tiles, 2, maps.channels), dtype=torch.float32)
    launch(
        _kernels().reduce_gradient, (tiles, maps.all, splits),
        laid_out_as(g, kept), kept, *units, _pointer(bias, kept), dz, through, parts,
        maps.samples, maps.channels, maps.pixels, *maps.strides,
        CENTRED=centred, BIAS=bias is not None, RELU=relu, OUTPUT=output,
        SPLITS=splits, BLOCK_O=block_o, BLOCK_P=block_p,
    )  # fmt: skip
    return dz, through, parts


def _finish(  # noqa: PLR0917 - what has come of the pass so far, in its order
    x: Tensor,
    dx: Tensor | None,
    units: _Units,
    through: Tensor,
    parts: Tensor,
    filters: tuple[Tensor | None, Tensor | None, Tensor | None],
    output: Tensor,
    settings: Settings,
) -> None:
    """Add to `dx` what it lacks; of `filters`, (dw, own, db), write own and db."""
    dw, own, db = filters
    taps, weights = 1, 0
    if dw is not None and own is not None:
        dw, taps = _laid_out_for(dw, own)
        weights = own.numel() // len(units.sums)
    target = x if dx is None else dx
    source, last, outputs = maps_of(x), maps_of(target), maps_of(output)
    block_c, block_q = source.tile()
    tiles = cdiv(cdiv(source.pixels, 4), block_q)
    shares = _splits(source.all * tiles, source.channels, block_c)
    programs = 0 if dx is None else tiles * source.all * shares
    others = 0 if dw is None and db is None else len(units.sums)
    if not programs + others:
        return
    launch(
        _kernels().finish_gradients, (programs + others,),
        x, target, _key(settings), units.mean, units.scale, through, parts,
        _pointer(dw, x), _pointer(own, x), _pointer(db, x),
        programs, source.all, source.samples, source.channels, *source.size,
        *outputs.size, *_words(source, settings), *_moment_weights(settings),
        _key_stride(settings), *source.strides, *last.strides,
        outputs.channels, parts[..., 0, 0].numel() // outputs.clients, weights,
        **_taps(settings), **_masking(settings), ALIGNED=source.pixels % 4 == 0,
        QUADS=source.quads(x) and last.quads(target),
        CENTRED=settings.centres_filters, BIAS=db is not None, WEIGHT=dw is not None, TAPS=taps,
        SPLITS=len(through), SHARES=shares, BLOCK_C=block_c, BLOCK_Q=block_q,
    )  # fmt: skip


def _convolved(x: Tensor, used: Tensor, settings: Settings) -> Tensor:
    if x.dim() == 5:
        return stacked_convolution.convolved(x, used, None, settings.geometry)
    return F.conv2d(x, used, None, *settings.geometry[1:])


def _convolution_gradients(
    dz: Tensor, x: Tensor, used: Tensor, settings: Settings, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    geometry = settings.geometry
    if x.dim() == 5:
        dx, dw = stacked_convolution.gradients(dz, x, used, geometry, wanted[:2])
    else:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dz, x, used, None, *geometry[1:4], False, [0, 0], geometry.groups,
            (wanted[0], wanted[1], False),
        )  # fmt: skip
    return None if dx is None else dense(dx), dw


def _splits(programs: int, channels: int, block: int) -> int:
    """Into how many shares the channels are cut, where the pixels alone make few programs."""
    return max(1, min(cdiv(channels, block), _PROGRAMS // max(programs, 1), 16))


def _taps(settings: Settings) -> dict[str, int]:
    names = ("K", "S", "P", "D")
    sizes = zip(names, settings.geometry[:4], strict=True)
    return {name + axis: size[d] for name, size in sizes for d, axis in enumerate("HW")}


def _moment_weights(settings: Settings) -> tuple[float, float]:
    """Return the first of `moment_weights`, and by how much the second is more than one of it."""
    first, second = moment_weights(settings.n, settings.level, settings.key is not None)
    return first, second / first - 1.0


def _words(maps: Maps, settings: Settings) -> tuple[int, int]:
    return cdiv(maps.channels * maps.pixels, 4), settings.level


def _key(settings: Settings) -> int | Tensor:
    return 0 if settings.key is None else settings.key


def _key_stride(settings: Settings) -> int:
    key = settings.key
    return key.stride(0) if isinstance(key, Tensor) and key.dim() else 0


def _masking(settings: Settings) -> dict[str, bool]:
    key = settings.key
    return {"MASKED": key is not None, "POINTER": isinstance(key, Tensor)}


def _dense_filters(weight: Tensor) -> Tensor:
    """Return the filters in pieces of memory, one after another."""
    return weight if weight.is_contiguous() or _channels_last(weight) else weight.contiguous()


def _channels_last(weight: Tensor) -> bool:
    own = weight.flatten(0, -4) if weight.dim() == 5 else weight
    return own.is_contiguous(memory_format=torch.channels_last)


def _laid_out_for(dw: Tensor, like: Tensor) -> tuple[Tensor, int]:
    """Return `dw` in a layout that can be written into `like`, and the taps to turn it by."""
    if like.is_contiguous():
        if dw.is_contiguous():
            return dw, 1
        if _channels_last(dw):
            return dw, dw.shape[-2] * dw.shape[-1]
    elif _channels_last(dw):
        return dw, 1
    return torch.empty_like(like).copy_(dw), 1


def _pointer(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor  # one that is not read


assert LEVELS == 1 << 16, "the kernels take lanes of 16 bits"
