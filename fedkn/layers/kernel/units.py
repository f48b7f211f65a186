"""KernelNorm of units laid side by side, and its gradient by hand.

On a GPU units of single pixels are the convolution's Triton kernels without a convolution. Else
kept for the backward pass are the units, which are the layer's own input where the kernel is 1x1,
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

from fedkn.layers import circumstances, side_by_side
from fedkn.layers.kernel import definition
from fedkn.layers.kernel.backends import plain, triton
from fedkn.layers.kernel.definition import spread, undisturbed
from fedkn.layers.kernel.dtypes import wide
from fedkn.layers.kernel.settings import Settings
from fedkn.layers.kernel.statistics import box
from fedkn.layers.map_layout import in_one_piece

__all__ = ["normalized"]


def normalized(units: Tensor, settings: Settings, eager: bool) -> Tensor:
    """Return `fedkn.layers.kernel.definition.norm`, gradients by hand where tensors are eager.

    `units` is (N, C, OH * KH, OW * KW); `settings.geometry` has windows as far apart as they are
    large. `eager` as in `fedkn.layers.circumstances`. Returns the input's shape and dtype.
    """
    if not settings.averages_over_drops and _by_triton(units, settings, eager):
        return _of_pixels(units, settings, eager)
    if not eager or settings.averages_over_drops:
        return definition.norm(units, settings)
    if torch.is_grad_enabled() and units.requires_grad:
        y: Tensor = _NormalizedUnits.apply(units, settings)  # type: ignore[no-untyped-call] # torch's
        return y
    with undisturbed(units):
        return _forward(units, settings)[0]


def _by_triton(units: Tensor, settings: Settings, eager: bool) -> bool:
    """Whether units are single pixels on a GPU, eager or of clients under one vmap."""
    return (
        settings.geometry.kernel == (1, 1)
        and (eager or circumstances.one_vmap_over(units))
        and bool(triton.takes(units, units))
    )


def _of_pixels(units: Tensor, settings: Settings, eager: bool) -> Tensor:
    if eager:
        y: Tensor = _NormalizedPixels.apply(units, settings)  # type: ignore[no-untyped-call] # torch's
        return y
    clients, key = side_by_side.clients_of(units), settings.key
    with side_by_side.outside():
        maps = side_by_side.taken_out(units, 0, clients)
        if isinstance(key, Tensor):
            settings = settings._replace(key=side_by_side.taken_out(key, 0, clients))
        y = _NormalizedPixels.apply(maps, settings)  # type: ignore[no-untyped-call] # torch's
    return side_by_side.put_back(y, 0)


class _NormalizedPixels(torch.autograd.Function):
    """Of (N, C, H, W), or of clients' (K, N, C, H, W) with a key each."""

    @staticmethod
    def forward(ctx: Any, units: Tensor, settings: Settings) -> Tensor:
        units = in_one_piece(units)
        y, kept = triton.norm(units, settings)
        ctx.settings = settings
        ctx.save_for_backward(units, y, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        units, y, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _through_definition(g, units, ctx.settings), None
        return triton.norm_gradient(g, units, y, tuple(kept), ctx.settings), None


def _forward(units: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor, bool]:
    values = units.to(wide(units.dtype))
    mean, scale, far, _ = plain.unit_statistics(values, settings, keep=False)
    return _normal(values, mean, scale, settings).to(units.dtype), mean, scale, far


def _normal(values: Tensor, mean: Tensor, scale: Tensor, settings: Settings) -> Tensor:
    kernel = settings.geometry.kernel
    return (values - spread(mean, kernel)).mul_(spread(scale, kernel))


class _NormalizedUnits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, units: Tensor, settings: Settings) -> Tensor:
        with undisturbed(units):
            y, mean, scale, far = _forward(units, settings)
        ctx.settings, ctx.far = settings, far
        ctx.save_for_backward(units, mean, scale)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        units, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _through_definition(g, units, ctx.settings), None
        return _gradient(g, units, mean, scale, ctx.settings, ctx.far), None


def _through_definition(g: Tensor, units: Tensor, settings: Settings) -> Tensor:
    """Return the gradient with derivatives of its own: rare, so left to autograd."""
    # An alias: g may depend on the units, but that way is not this function's.
    alias = units.view_as(units)
    if units.dim() == 4:
        y = definition.norm(alias, settings)
    else:
        parts = zip(alias, settings.of_clients(len(units)), strict=True)
        y = torch.stack([definition.norm(*part) for part in parts])
    return torch.autograd.grad(y, alias, g, create_graph=True)[0]


def _gradient(  # noqa: PLR0917 - what the forward pass kept, in its order
    g: Tensor, units: Tensor, mean: Tensor, scale: Tensor, settings: Settings, far: bool
) -> Tensor:
    geometry, dtype = settings.geometry, wide(units.dtype)
    g, values = g.to(dtype), units.to(dtype)
    total = box(g.sum(1, keepdim=True), geometry)
    products = _normal(values, mean, scale, settings).mul_(g).sum(1, keepdim=True)
    curvature = box(products, geometry).mul_(scale).mul_(scale)  # -2 * dvar
    gradient = g * spread(scale, geometry.kernel)
    plain.add_through_statistics(
        gradient, values, (mean, total.mul_(scale), curvature), settings, far
    )
    return gradient.to(units.dtype)
