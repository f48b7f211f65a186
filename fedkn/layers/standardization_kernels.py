# A kernel's arguments are pointers and numbers that only Triton types, and it has many of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: PLR0917
"""Scaled weight standardization of several clients' filters: a Triton kernel each way.

Filters are (K, O, C/groups, KH, KW), contiguous, of WEIGHTS weights each; gains (K, O). A program
takes a filter.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["standardize", "standardize_back"]

_WEIGHTS = tl.constexpr(1024)  # at once


@triton.jit
def standardize(weight, gain, used, mean, energy, WEIGHTS, least):
    """used = gain * (w - mean) / sqrt(max(E, least)), where E, the energy, sums (w - mean)^2."""
    f = tl.program_id(0)
    weight += f.to(tl.int64) * WEIGHTS
    used += f.to(tl.int64) * WEIGHTS
    total = tl.zeros([_WEIGHTS], tl.float32)
    for first in range(0, WEIGHTS, _WEIGHTS):
        i = first + tl.arange(0, _WEIGHTS)
        total += tl.load(weight + i, i < WEIGHTS, 0.0).to(tl.float32)
    m = tl.sum(total, 0) / WEIGHTS
    squares = tl.zeros([_WEIGHTS], tl.float32)
    for first in range(0, WEIGHTS, _WEIGHTS):
        i = first + tl.arange(0, _WEIGHTS)
        far = tl.load(weight + i, i < WEIGHTS, 0.0).to(tl.float32) - m
        squares += tl.where(i < WEIGHTS, far * far, 0.0)
    e = tl.sum(squares, 0)
    tl.store(mean + f, m)
    tl.store(energy + f, e)
    factor = tl.load(gain + f).to(tl.float32) / tl.sqrt(tl.maximum(e, least))
    for first in range(0, WEIGHTS, _WEIGHTS):
        i = first + tl.arange(0, _WEIGHTS)
        value = tl.load(weight + i, i < WEIGHTS, 0.0).to(tl.float32)
        tl.store(used + i, (value - m) * factor, i < WEIGHTS)


@triton.jit
def standardize_back(g, weight, gain, mean, energy, dw, dgain, WEIGHTS, least):
    """dw = gain * s * (g - mean(g) - h * dgain) with h = (w - mean) * s, s = max(E, least)^(-1/2).

    dgain sums g * h; its product with h is left out where E is below `least`, and s a constant.
    """
    f = tl.program_id(0)
    weight += f.to(tl.int64) * WEIGHTS
    g += f.to(tl.int64) * WEIGHTS
    dw += f.to(tl.int64) * WEIGHTS
    m = tl.load(mean + f)
    e = tl.load(energy + f)
    s = 1.0 / tl.sqrt(tl.maximum(e, least))
    total = tl.zeros([_WEIGHTS], tl.float32)
    products = tl.zeros([_WEIGHTS], tl.float32)
    for first in range(0, WEIGHTS, _WEIGHTS):
        i = first + tl.arange(0, _WEIGHTS)
        upstream = tl.load(g + i, i < WEIGHTS, 0.0).to(tl.float32)
        total += upstream
        products += upstream * (tl.load(weight + i, i < WEIGHTS, 0.0).to(tl.float32) - m) * s
    product = tl.sum(products, 0)
    tl.store(dgain + f, product)
    through = tl.where(e < least, 0.0, product)
    factor = tl.load(gain + f).to(tl.float32) * s
    offset = tl.sum(total, 0) / WEIGHTS
    for first in range(0, WEIGHTS, _WEIGHTS):
        i = first + tl.arange(0, _WEIGHTS)
        h = (tl.load(weight + i, i < WEIGHTS, 0.0).to(tl.float32) - m) * s
        upstream = tl.load(g + i, i < WEIGHTS, 0.0).to(tl.float32)
        tl.store(dw + i, factor * (upstream - offset - h * through), i < WEIGHTS)
