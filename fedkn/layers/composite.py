"""The kernel-normalized convolution written in differentiable torch operations.

The definition the other paths are held against. It is what runs where they cannot: under
`torch.func` transforms, `torch.compile`, export, tracing, and for derivatives of gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.layers.dropout import keep_mask
from fedkn.layers.dtypes import undisturbed, wide
from fedkn.layers.small_units import SMALL_UNIT, expected_scale_and_shift
from fedkn.layers.statistics import Geometry, statistics, unit_size

__all__ = [
    "Settings",
    "averages_over_drops",
    "composite",
    "draw_mask",
    "filter_sums",
    "is_centred",
    "unit_maps",
]


class Settings(NamedTuple):
    """What a kernel-normalized convolution does to its tensors."""

    geometry: Geometry
    key: int | Tensor | None
    """The key of the dropout mask; None for deterministic statistics."""
    level: int
    """The drop probability in units of 1/65536."""
    eps: float
    relu: bool
    keeps_output: bool = False
    """Whether the output itself is kept for the backward pass even without ReLU."""

    @property
    def one_map(self) -> bool:
        """Whether the only map of filters that is kept is the output."""
        return self.relu or self.keeps_output


def composite(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """Return (conv(x, w) - mean * sum(w)) / sqrt(var + eps) + bias, (N, O, OH, OW).

    A deterministic pass averages small units over their drops (`fedkn.layers.small_units`).

    `x` is (N, C, H, W), `weight` (O, C/groups, KH, KW), `bias` (O,) or None. Statistics and the
    normalization are in float32 at least; the convolution is in x's dtype, or autocast's.
    """
    _, stride, padding, dilation, groups = settings.geometry
    dtype = wide(x.dtype)
    with undisturbed(x.device.type):
        mean, scale, shift = unit_maps(x.to(dtype), settings)
        centred = is_centred(settings)
        used = weight - weight.mean((1, 2, 3), keepdim=True) if centred else weight
    z = F.conv2d(x, used, None, stride, padding, dilation, groups)
    with undisturbed(x.device.type):
        y = z.to(dtype)
        if not centred:
            y = y - mean * filter_sums(weight.to(dtype))
        y = y * scale
        if shift is not None:
            y = y + shift * filter_sums(weight.to(dtype))
        if bias is not None:
            y = y + bias.to(dtype).view(1, -1, 1, 1)
        if settings.relu:
            y = F.relu(y)
    return y.to(z.dtype)


def unit_maps(x: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the mean, the scale and the shift of each unit of `x`, each (N, 1, OH, OW).

    A normalized unit is (U - mean) * scale + shift, None for zero. `x` is of the statistics' dtype.
    """
    if averages_over_drops(x, settings):
        n = unit_size(x, settings.geometry)
        mean, variance = statistics(x, None, 0, settings.geometry)
        scale, shift = expected_scale_and_shift(mean, variance, n, settings.level, settings.eps)
        return mean, scale, shift
    mask = draw_mask(x, settings)
    mean, variance = statistics(x, mask, settings.level, settings.geometry)
    return mean, torch.rsqrt(variance + settings.eps), None


def averages_over_drops(x: Tensor, settings: Settings) -> bool:
    """Whether a deterministic pass averages over the number of dropped elements: small units."""
    if settings.key is not None or not settings.level:
        return False
    return unit_size(x, settings.geometry) <= SMALL_UNIT


def is_centred(settings: Settings) -> bool:
    """Whether centred weights take the mean away.

    Without a mask the mean is that of the convolution's own input, so conv(x, w - mean(w)) is
    conv(x, w) - mean * sum(w), and loses fewer digits than a subtraction afterwards. With groups
    the mean is over all channels while a filter sees some, so it does not hold.
    """
    return settings.key is None and settings.geometry.groups == 1


def filter_sums(weight: Tensor) -> Tensor:
    """Return the sum of each filter's weights, (1, O, 1, 1)."""
    return weight.sum((1, 2, 3)).view(1, -1, 1, 1)


def draw_mask(x: Tensor, settings: Settings) -> Tensor | None:
    """Return the mask of zeros and ones of `settings` for `x`, in the statistics' dtype."""
    if settings.key is None:
        return None
    return keep_mask(settings.key, x.shape, settings.level, wide(x.dtype), x.device)
