"""KernelNorm of units laid side by side, and its gradient by hand.

Kept for the backward pass are the units, which are the layer's own input where the kernel is 1x1,
and two maps of one value per unit; the dropout mask is drawn again from its key. With n elements u
in a unit, m their mask, r = 1/(1-p), the equations are

    y = (u - mean) * s,   s = 1/sqrt(var + eps)
    dvar = -s^2/2 * sum g * y,   dmean = -s * sum g
    du = g * s + m * (r/n * (dmean - 2 * dvar * mean) + 2 r^2/n * dvar * u)

Equation 2 of Nasirigerdeh et al., TMLR 2024, arXiv 2205.10089.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkn.layers import plain
from fedkn.layers.composite import Settings, averages_over_drops, unit_maps
from fedkn.layers.dtypes import undisturbed, wide
from fedkn.layers.statistics import box

__all__ = ["normalized_units"]


def normalized_units(units: Tensor, settings: Settings, eager: bool) -> Tensor:
    """Normalize units that lie side by side, each by its own mean and variance.

    `units` is (N, C, OH * KH, OW * KW); `settings.geometry` has windows as far apart as they are
    large. `eager` as in `fedkn.layers.autograd`. Returns the input's shape and dtype.
    """
    if not eager or averages_over_drops(units, settings):
        return _definition(units, settings)
    if torch.is_grad_enabled() and units.requires_grad:
        y: Tensor = _NormalizedUnits.apply(units, settings)  # type: ignore[no-untyped-call] # torch's
        return y
    with undisturbed(units.device.type):
        return _forward(units, settings)[0]


def _definition(units: Tensor, settings: Settings) -> Tensor:
    dtype, kernel = wide(units.dtype), settings.geometry.kernel
    with undisturbed(units.device.type):
        mean, scale, shift = unit_maps(units.to(dtype), settings)
        y = (units - _spread(mean, kernel)) * _spread(scale, kernel)
        if shift is not None:
            y = y + _spread(shift, kernel)
    return y.to(units.dtype)


def _forward(units: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor, bool]:
    values = units.to(wide(units.dtype))
    mean, scale, far, _ = plain.unit_statistics(values, settings, keep=False)
    return _normal(values, mean, scale, settings).to(units.dtype), mean, scale, far


def _normal(values: Tensor, mean: Tensor, scale: Tensor, settings: Settings) -> Tensor:
    kernel = settings.geometry.kernel
    return (values - _spread(mean, kernel)).mul_(_spread(scale, kernel))


class _NormalizedUnits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, units: Tensor, settings: Settings) -> Tensor:
        with undisturbed(units.device.type):
            y, mean, scale, far = _forward(units, settings)
        ctx.settings, ctx.far = settings, far
        ctx.save_for_backward(units, mean, scale)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        units, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Derivatives of gradients are rare, so left to autograd, through the definition. An
            # alias: g may depend on the units, but that way is not this function's.
            alias = units.view_as(units)
            y = _definition(alias, ctx.settings)
            return (*torch.autograd.grad(y, alias, g, create_graph=True), None)
        return _gradient(g, units, mean, scale, ctx.settings, ctx.far), None


def _gradient(  # noqa: PLR0917 - what the forward pass kept, in its order
    g: Tensor, units: Tensor, mean: Tensor, scale: Tensor, settings: Settings, far: bool
) -> Tensor:
    geometry, dtype = settings.geometry, wide(units.dtype)
    g, values = g.to(dtype), units.to(dtype)
    total = box(g.sum(1, keepdim=True), geometry)
    products = _normal(values, mean, scale, settings).mul_(g).sum(1, keepdim=True)
    curvature = box(products, geometry).mul_(scale).mul_(scale)  # -2 * dvar
    gradient = g * _spread(scale, geometry.kernel)
    plain.add_through_statistics(
        gradient, values, (mean, total.mul_(scale), curvature), settings, far
    )
    return gradient.to(units.dtype)


def _spread(maps: Tensor, kernel: tuple[int, int]) -> Tensor:
    if kernel == (1, 1):
        return maps
    return maps.repeat_interleave(kernel[0], 2).repeat_interleave(kernel[1], 3)
