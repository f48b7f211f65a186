"""Mean and variance of every kernel position, without unfolding.

Reduce over the channels first (a map of sums and a map of sums of squares), then sum both over
the window with the convolution's stride: a box filter. Equations 1 and 2 of Nasirigerdeh et al.,
"Kernel Normalized Convolutional Networks", TMLR 2024, arXiv 2205.10089.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.layers.kernel.host_masks import LEVELS
from fedkn.layers.kernel.settings import Geometry

__all__ = [
    "box",
    "box_quickly",
    "moment_weights",
    "statistics",
    "unbox",
    "unbox_quickly",
]


# Multiplications up to which two products with banded matrices take less time than the dozen calls
# that `box` and `unbox` make.
_FEW = 1 << 20


def statistics(
    x: Tensor, mask: Tensor | None, level: int, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each unit, both (N, 1, OH, OW), of x's dtype.

    `x` is (N, C, H, W); a unit is all its channels under one kernel position, zero padding
    included. With a `mask` (zeros and ones, x's shape) they are those of the dropped-out unit
    x * mask / (1 - p), p = level/LEVELS; without one, the mean is x's own and the variance is the
    one that dropout gives in expectation, v + p/(1-p) * E[x^2] * (1 - 1/n).
    """
    n = geometry.unit_size(x.shape[1])
    boxed = box(_sums(x, mask), geometry)
    first, second = moment_weights(n, level, mask is not None)
    mean = boxed[:, :1] * first
    square = boxed[:, 1:] * second
    variance = (square - mean * mean).clamp_min(0.0)
    return mean.to(x.dtype), variance.to(x.dtype)


def moment_weights(n: int, level: int, masked: bool) -> tuple[float, float]:
    """Return what the sum and the sum of squares of a unit are multiplied by.

    The mean is the first times the sum, the variance the second times the sum of squares, minus
    the squared mean; `level` and `masked` as in `statistics`.
    """
    keep = 1.0 - level / LEVELS
    if masked:
        return 1.0 / (n * keep), 1.0 / (n * keep * keep)
    return 1.0 / n, (1.0 + (1.0 - keep) / keep * (1.0 - 1.0 / n)) / n


def box(maps: Tensor, geometry: Geometry) -> Tensor:
    """Sum `maps`, (N, K, H, W), over each window: (N, K, OH, OW)."""
    maps = F.pad(maps, (geometry.padding[1],) * 2 + (geometry.padding[0],) * 2)
    for dim in (2, 3):
        kernel, stride, _, dilation = (sizes[dim - 2] for sizes in geometry[:4])
        span = maps.shape[dim] - dilation * (kernel - 1)
        taps = [maps.narrow(dim, i * dilation, span) for i in range(kernel)]
        maps = sum(taps[1:], taps[0])
        if stride > 1:
            maps = maps[:, :, ::stride] if dim == 2 else maps[..., ::stride]
    return maps


def box_quickly(maps: Tensor, geometry: Geometry, factor: float = 1.0) -> Tensor:
    """Return `factor` times `box`, without derivatives; by two products where maps are small."""
    bands = _bands(maps.shape, geometry, maps.dtype, factor) if _allows_products(maps) else None
    if bands is None:
        boxed = box(maps, geometry)
        return boxed if factor == 1.0 else boxed * factor
    return _products(maps, *bands)


def unbox_quickly(maps: Tensor, size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Do what `unbox` does, without derivatives, by two products where the maps are small."""
    bands = None
    if _allows_products(maps):
        bands = _bands(maps.shape, geometry, maps.dtype, 1.0, size)
    if bands is None:
        kernel, stride, padding, dilation, groups = geometry
        back = (kernel[0] - 1 - padding[0], kernel[1] - 1 - padding[1])
        if stride != (1, 1) or dilation != (1, 1) or min(back) < 0:
            return unbox(maps, size, geometry)
        # With stride 1 it is a box filter itself.
        return box(maps, Geometry(kernel, stride, back, dilation, groups))
    return _products(maps, *bands)


def unbox(maps: Tensor, size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Spread `maps`, (N, K, OH, OW), over their windows: (N, K, *size). The transpose of `box`."""
    for dim in (2, 3):
        kernel, stride, padding, dilation = (sizes[dim - 2] for sizes in geometry[:4])
        if stride > 1:
            shape = list(maps.shape)
            shape[dim] = (shape[dim] - 1) * stride + 1
            sparse = maps.new_zeros(shape)
            (sparse[:, :, ::stride] if dim == 2 else sparse[..., ::stride]).copy_(maps)
            maps = sparse
        reach = dilation * (kernel - 1)
        # The first position starts `padding` before the input; strides may leave its end uncovered.
        before, after = reach, size[dim - 2] + padding - maps.shape[dim]
        span = size[dim - 2]
        maps = F.pad(maps, (0, 0, before, after) if dim == 2 else (before, after))
        taps = [maps.narrow(dim, padding + i * dilation, span) for i in range(kernel)]
        maps = sum(taps[1:], taps[0])
    return maps


def _allows_products(maps: Tensor) -> bool:
    return (
        maps.device.type == "cpu"
        and _exact_products()
        # The matrices are kept: they must not be what such a mode makes of a tensor.
        and not torch._C._len_torch_dispatch_stack()
    )


def _exact_products() -> bool:
    """Whether products of float32 matrices are in float32: fewer digits would ruin a variance."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for each backend by itself
        return False


def _products(maps: Tensor, down: Tensor, across: Tensor) -> Tensor:
    # As `down @ maps @ across`, which takes twice as many calls to get there.
    samples, count, rows, columns = maps.shape
    down = down.expand(samples * count, *down.shape)
    part = torch.bmm(down, maps.reshape(samples * count, rows, columns)).view(-1, columns)
    return torch.mm(part, across).view(samples, count, down.shape[1], across.shape[1])


@functools.lru_cache(maxsize=256)
def _bands(
    shape: tuple[int, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    factor: float,
    back_to: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The matrices before and after maps of `shape` in a product that is `factor` times `box`.

    With `back_to`, the size of its result, it is `unbox`. None where that takes too long, and for
    windows of one element and empty maps.
    """
    count, rows, columns = shape[0] * shape[1], *shape[2:]
    # About that many, whichever side of the window the maps are on.
    work = count * rows * columns * (rows * geometry.stride[0] + columns * geometry.stride[1])
    if geometry.kernel == (1, 1) or not 0 < work < _FEW:
        return None
    with torch.inference_mode(False), torch.device("cpu"):
        down, across = (
            _band(size, axis, geometry) for axis, size in enumerate(back_to or (rows, columns))
        )
        across = (across * factor).to(dtype)
        down = down.to(dtype)
    return (down, across.T) if back_to is None else (down.T, across)


def _band(inputs: int, axis: int, geometry: Geometry) -> Tensor:
    """The matrix, (outputs, inputs), float64, that sums the inputs of each window along an axis.

    `axis` is 0 for the height, 1 for the width.
    """
    kernel, stride, padding, dilation = (sizes[axis] for sizes in geometry[:4])
    outputs = (inputs + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    window = torch.arange(outputs).view(-1, 1, 1) * stride
    taps = window + torch.arange(kernel) * dilation - padding
    hits = taps == torch.arange(inputs).view(1, -1, 1)
    return hits.sum(2).to(torch.float64)


def _sums(x: Tensor, mask: Tensor | None) -> Tensor:
    # Sums over the channels are taken about each pixel's mean and moved back in float64: so
    # E[x^2] - mean^2 keeps its digits even where |mean| is a thousand deviations. The shift is a
    # constant for autograd, for the moments do not depend on it.
    shift = x.detach().mean(1, keepdim=True)
    centred = x - shift
    if mask is not None:
        centred = centred * mask
    first = centred.sum(1, keepdim=True).double()
    squares = centred.square().sum(1, keepdim=True).double()
    shift = shift.double()
    count = x.shape[1] if mask is None else mask.sum(1, keepdim=True).double()
    total = first + shift * count
    return torch.cat((total, squares + shift * (first + total)), 1)
