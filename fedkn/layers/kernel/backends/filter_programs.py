# A kernel's arguments are pointers and numbers that only Triton types, and it has many of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: PLR0917, E741
"""What is done to one filter, in a launch that there is anyway: sums, centring, gradients."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["finish_filter", "use_filter"]

_WEIGHTS = tl.constexpr(1024)  # at once


@triton.jit
def use_filter(
    weight, used, filters, filter_, WEIGHTS,
    CENTRED: tl.constexpr, COPY: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The sum of a filter's weights, and a copy of them, less their mean where CENTRED."""
    weight += filter_.to(tl.int64) * WEIGHTS
    total = tl.zeros([_WEIGHTS], tl.float32)
    for first in range(0, WEIGHTS, _WEIGHTS):
        i = first + tl.arange(0, _WEIGHTS)
        total += tl.load(weight + i, i < WEIGHTS, 0.0).to(tl.float32)
    whole = tl.sum(total, 0)
    tl.store(filters + filter_, whole)
    if COPY:
        used += filter_.to(tl.int64) * WEIGHTS
        for first in range(0, WEIGHTS, _WEIGHTS):
            i = first + tl.arange(0, _WEIGHTS)
            value = tl.load(weight + i, i < WEIGHTS, 0.0).to(tl.float32)
            if CENTRED:
                value -= whole / WEIGHTS
            tl.store(used + _channels_last(i, WEIGHTS, TAPS), value, i < WEIGHTS)


@triton.jit
def finish_filter(
    parts, dw, out, db, filter_, O, PARTS, WEIGHTS,
    CENTRED: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Of a filter db, and out: dw less sum(dz * mean), or its own mean where CENTRED."""
    parts += filter_ // O * PARTS * 2 * O + filter_ % O
    if BIAS:
        tl.store(db + filter_, _sum_of_parts(parts, O, PARTS))
    if WEIGHT:
        dw += filter_.to(tl.int64) * WEIGHTS
        out += filter_.to(tl.int64) * WEIGHTS
        if CENTRED:
            total = tl.zeros([_WEIGHTS], tl.float32)
            for first in range(0, WEIGHTS, _WEIGHTS):
                i = first + tl.arange(0, _WEIGHTS)
                total += tl.load(dw + i, i < WEIGHTS, 0.0).to(tl.float32)
            less = tl.sum(total, 0) / WEIGHTS
        else:
            less = _sum_of_parts(parts + O, O, PARTS)
        for first in range(0, WEIGHTS, _WEIGHTS):
            i = first + tl.arange(0, _WEIGHTS)
            value = tl.load(dw + _channels_last(i, WEIGHTS, TAPS), i < WEIGHTS, 0.0)
            tl.store(out + i, value.to(tl.float32) - less, i < WEIGHTS)


@triton.jit
def _channels_last(i, WEIGHTS, TAPS: tl.constexpr):
    """Where the i-th weight of a filter (C, TAPS) is in one that is (TAPS, C)."""
    if TAPS > 1:
        i = i % TAPS * (WEIGHTS // TAPS) + i // TAPS
    return i


@triton.jit
def _sum_of_parts(parts, O, PARTS):
    total = tl.zeros([_WEIGHTS], tl.float32)
    for first in range(0, PARTS, _WEIGHTS):
        i = first + tl.arange(0, _WEIGHTS)
        total += tl.load(parts + i * 2 * O, i < PARTS, 0.0)
    return tl.sum(total, 0)
