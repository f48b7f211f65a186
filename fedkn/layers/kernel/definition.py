"""KernelNorm and the kernel-normalized convolution: the papers' equations, as code.

A unit U is what one kernel position sees of x, (N, C, H, W): all C channels of a KH x KW window,
n = C * KH * KW numbers, padding included. Dropout with probability p gives U' from U: an element is
kept with probability 1 - p and then scaled by 1/(1-p). With mu and var the mean and the biased
variance of U',

    KernelNorm    y = (U - mu) / sqrt(var + eps)                                    Equation 2
    KNConv        y = (conv(x, w) - mu * sum(w)) / sqrt(var + eps) + b              Equations 3-5

for each unit and, in KNConv, each filter w, (C/groups, KH, KW), with its sum and its bias b. A
KNConv draws one mask on its padded input, which the windows share; in KernelNorm each window draws
its own. mu and var are over ALL channels also where the convolution has groups. Without a mask, in
evaluation, var is what dropout gives in expectation, var(U) + p/(1-p) * E[U^2] * (1 - 1/n), and
small units are averaged over how many of their elements drop (`small_units`).

In differentiable torch operations: this is what the backends are held against, and what runs where
they cannot: under `torch.func` transforms, `torch.compile`, export and tracing, for derivatives of
gradients, and for small units in evaluation. Statistics and the normalization are in float32 at
least, the convolution is in x's dtype, or autocast's.

Nasirigerdeh et al., "Kernel Normalized Convolutional Networks", TMLR 2024, arXiv 2205.10089.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.layers.kernel.dropout import draw_mask
from fedkn.layers.kernel.dtypes import wide
from fedkn.layers.kernel.settings import Settings
from fedkn.layers.kernel.small_units import expected_scale_and_shift
from fedkn.layers.kernel.statistics import statistics

__all__ = [
    "centred",
    "convolution",
    "filter_sums",
    "norm",
    "spread",
    "undisturbed",
    "without_autocast_regions",
]


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """KNConv: return (conv(x, w) - mean * sum(w)) / sqrt(var + eps) + bias, (N, O, OH, OW).

    `x` is (N, C, H, W), `weight` (O, C/groups, KH, KW), `bias` (O,) or None.
    """
    _, stride, padding, dilation, groups = settings.geometry
    dtype = wide(x.dtype)
    with undisturbed(x):
        mean, scale, shift = _moments(x.to(dtype), settings)
        used = centred(weight) if settings.centres_filters else weight
    z = F.conv2d(x, used, None, stride, padding, dilation, groups)
    with undisturbed(z):
        y = z.to(dtype)
        if not settings.centres_filters:
            y = y - mean * filter_sums(weight.to(dtype))
        y = y * scale
        if shift is not None:
            y = y + shift * filter_sums(weight.to(dtype))
        if bias is not None:
            y = y + bias.to(dtype).view(1, -1, 1, 1)
        if settings.relu:
            y = F.relu(y)
    return y.to(z.dtype)


def norm(units: Tensor, settings: Settings) -> Tensor:
    """KernelNorm: return (U - mean) / sqrt(var + eps) for units that lie side by side.

    `units` is (N, C, OH * KH, OW * KW), and so is the result; `settings.geometry` has windows as
    far apart as they are large.
    """
    dtype, kernel = wide(units.dtype), settings.geometry.kernel
    with undisturbed(units):
        mean, scale, shift = _moments(units.to(dtype), settings)
        y = (units - spread(mean, kernel)) * spread(scale, kernel)
        if shift is not None:
            y = y + spread(shift, kernel)
    return y.to(units.dtype)


def centred(weight: Tensor) -> Tensor:
    """Return (O, C/groups, KH, KW) less each filter's mean."""
    return weight - weight.mean((1, 2, 3), keepdim=True)


def filter_sums(weight: Tensor) -> Tensor:
    """Return the sum of each filter's weights, (1, O, 1, 1)."""
    return weight.sum((1, 2, 3)).view(1, -1, 1, 1)


def spread(maps: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Return the value of each unit, (N, 1, OH, OW), at all of its pixels."""
    if kernel == (1, 1):
        return maps
    return maps.repeat_interleave(kernel[0], 2).repeat_interleave(kernel[1], 3)


def undisturbed(x: Tensor) -> AbstractContextManager[object]:
    """Return the context in which autocast changes no dtype on the device of `x`.

    Some know no autocast, as "meta" does, and torch raises where it is switched off for them.
    """
    if _Regions.wanted and torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


@contextmanager
def without_autocast_regions() -> Iterator[None]:
    """Let `undisturbed` leave no regions in what is recorded meanwhile, unless autocast is on.

    For programs that run where there is no autocast: the recorder makes a graph of every region,
    and takes half as long again.
    """
    _Regions.wanted = torch.is_autocast_enabled("cpu")
    try:
        yield
    finally:
        _Regions.wanted = True


class _Regions:
    wanted = True


def _moments(x: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return mean, 1/sqrt(var + eps) and shift of each unit of `x`, each (N, 1, OH, OW).

    A normalized unit is (U - mean) * scale + shift, None for zero. `x` is of the statistics' dtype.
    """
    geometry, n, _, level, eps, *_ = settings
    small, mask = settings.averages_over_drops, draw_mask(x, settings)
    mean, variance = statistics(x, mask, 0 if small else level, geometry)
    if small:
        return mean, *expected_scale_and_shift(mean, variance, n, level, eps)
    return mean, torch.rsqrt(variance + eps), None
