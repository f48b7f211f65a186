"""Which backend computes a kernel-normalized convolution: the first row of `TABLE` that serves.

A backend is a module of `fedkn.layers.kernel.backends` with

    serves(x, weight, bias)   True, or a `No` that says why not
    forward(…)                from (x, weight, bias, settings) to the output
    backward(…)               from the output's gradient to those of x, weight and bias

cpp's autograd is C++ like its kernels, and vmap is cpp for several clients side by side. plain and
triton are by hand: what is kept between the two passes, and how autograd sees them, is in
`fedkn.layers.kernel.autograd`.

Tensors are eager, or a transform, compiler, exporter or tracer looks on (`circumstances`): who
looks on is given the definition, which it can see through, but for the one vmap that a backend
serves. Small units in evaluation are averaged by the definition alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedkn.layers.circumstances import No, Served
from fedkn.layers.kernel import definition
from fedkn.layers.kernel.autograd import by_hand
from fedkn.layers.kernel.backends import cpp, plain, triton, vmap
from fedkn.layers.kernel.settings import Settings

__all__ = ["TABLE", "Row", "answers", "convolution"]


class Row(NamedTuple):
    """A way to compute the convolution, and where it is taken."""

    name: str
    eager: bool
    """Whether it takes eager tensors, or those that somebody looks on."""
    serves: Callable[[Tensor, Tensor, Tensor | None], Served]
    run: Callable[[Tensor, Tensor, Tensor | None, Settings], Tensor]
    """From (x, weight, bias, settings) to the output, which autograd differentiates."""


TABLE = (
    Row("vmap", False, vmap.serves, vmap.forward),
    Row("cpp", True, cpp.serves, cpp.forward),
    Row("triton", True, triton.serves, by_hand(triton)),
    Row("plain", True, plain.serves, by_hand(plain)),
)
"""The backends by preference. Where none serves, `fedkn.layers.kernel.definition` does."""


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, eager: bool
) -> Tensor:
    """Return `fedkn.layers.kernel.definition.convolution`, by the fastest way that serves.

    `eager` is what `fedkn.layers.circumstances.eager` said when the mask's key was drawn.
    """
    small = settings.averages_over_drops
    if eager and not small and (dtype := _autocast_dtype(x)):
        # The backends know nothing of autocast: it is done for them.
        with torch.autocast(x.device.type, enabled=False):
            return convolution(x.to(dtype), weight.to(dtype), bias, settings, eager)
    for row in () if small else TABLE:
        if row.eager == eager and row.serves(x, weight, bias):
            return row.run(x, weight, bias, settings)
    return definition.convolution(x, weight, bias, settings)


def answers(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, eager: bool
) -> dict[str, Served]:
    """Return what each row says, by its name, up to the first that serves.

    Arguments as of `convolution`. Where none says True, the definition serves.
    """
    small = settings.averages_over_drops
    if eager and not small and (dtype := _autocast_dtype(x)):
        x, weight = x.to(dtype), weight.to(dtype)
    found: dict[str, Served] = {}
    for row in TABLE:
        if small:
            found[row.name] = _SMALL
        elif row.eager != eager:
            found[row.name] = _LOOKED_ON if row.eager else _EAGER
        else:
            found[row.name] = row.serves(x, weight, bias)
        if found[row.name]:
            break
    return found


_SMALL = No("units this small are averaged over how many of their elements drop")
_LOOKED_ON = No("a transform, compiler, exporter or tracer looks on")
_EAGER = No("no transform is under way")


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast convolves `x`; None where it is off or lets `x` be."""
    if not torch._C._is_any_autocast_enabled() or x.dtype == torch.float64:
        return None
    device = x.device.type
    # Not every type of device knows autocast: "meta" does not.
    known = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if known else None
