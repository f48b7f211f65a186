# A kernel's arguments are pointers and numbers that only Triton types, and it has many of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: PLR0917
"""GroupNorm of several clients' maps, and the ReLU after it: a Triton kernel each way.

Maps are (K, N, C, H, W) in any layout with evenly spaced pixels, gains and shifts (K, C). A program
takes a group of a sample. Everything is summed in float32 and in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["normalize", "normalize_back"]


@triton.jit
def _place(n_th, N, group, EACH, stride_k, stride_n, stride_c):
    """Where a group begins."""
    return (
        (n_th // N).to(tl.int64) * stride_k
        + (n_th % N).to(tl.int64) * stride_n
        + (group * EACH).to(tl.int64) * stride_c
    )


@triton.jit
def normalize(
    x, y, weight, bias, mean, scale,
    N, EACH, PIXELS, eps, stride_k, stride_n, stride_c, stride_p,
    RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) / sqrt(var + eps) * gain + shift, with ReLU where RELU.

    mean and scale, 1/sqrt(var + eps), are (K * N, groups). A group has EACH channels.
    """
    group = tl.program_id(0)
    n_th = tl.program_id(1)
    groups = tl.num_programs(0)
    here = _place(n_th, N, group, EACH, stride_k, stride_n, stride_c)
    one = n_th // N * groups * EACH + group * EACH
    c = tl.arange(0, BLOCK_C)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    some = tl.load(x + here + c * stride_c + p * stride_p, (c < EACH) & (p < PIXELS), 0.0)
    # About the first values' mean sums lose no digits.
    count = tl.minimum(EACH, BLOCK_C) * tl.minimum(PIXELS, BLOCK_P)
    shift = tl.sum(tl.sum(some.to(tl.float32), 1), 0) / count
    first = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    squares = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for c0 in range(0, EACH, BLOCK_C):
        for p0 in range(0, PIXELS, BLOCK_P):
            inside = (c0 + c < EACH) & (p0 + p < PIXELS)
            at = here + (c0 + c) * stride_c + (p0 + p) * stride_p
            far = tl.load(x + at, inside, 0.0).to(tl.float32) - shift
            far = tl.where(inside, far, 0.0)
            first += far
            squares += far * far
    size = EACH * PIXELS
    off = tl.sum(tl.sum(first, 1), 0) / size
    variance = tl.maximum(tl.sum(tl.sum(squares, 1), 0) / size - off * off, 0.0)
    s = 1.0 / tl.sqrt(variance + eps)
    tl.store(mean + n_th * groups + group, shift + off)
    tl.store(scale + n_th * groups + group, s)
    for c0 in range(0, EACH, BLOCK_C):
        gain = tl.load(weight + one + c0 + c, c0 + c < EACH, 0.0).to(tl.float32)
        up = tl.load(bias + one + c0 + c, c0 + c < EACH, 0.0).to(tl.float32)
        for p0 in range(0, PIXELS, BLOCK_P):
            inside = (c0 + c < EACH) & (p0 + p < PIXELS)
            at = here + (c0 + c) * stride_c + (p0 + p) * stride_p
            value = (tl.load(x + at, inside, 0.0).to(tl.float32) - shift - off) * s * gain + up
            if RELU:
                value = tl.where(value < 0.0, 0.0, value)
            tl.store(y + at, value, inside)


@triton.jit
def normalize_back(
    g, x, weight, bias, mean, scale, dx, parts,
    N, EACH, PIXELS, stride_k, stride_n, stride_c, stride_p,
    RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = s * (g * gain - (a + h * b) / n), with h = (x - mean) * s and the group's n values.

    a and b are the sums of g * gain and of g * gain * h; parts, (K * N, 2, C), gets each channel's
    sums of g * h and of g. Where RELU, g is zero where the output was.
    """
    group = tl.program_id(0)
    n_th = tl.program_id(1)
    groups = tl.num_programs(0)
    here = _place(n_th, N, group, EACH, stride_k, stride_n, stride_c)
    one = n_th // N * groups * EACH + group * EACH
    m = tl.load(mean + n_th * groups + group)
    s = tl.load(scale + n_th * groups + group)
    p = tl.arange(0, BLOCK_P)[None, :]
    a = tl.zeros([BLOCK_C], tl.float32)
    b = tl.zeros([BLOCK_C], tl.float32)
    for c0 in range(0, EACH, BLOCK_C):
        which = c0 + tl.arange(0, BLOCK_C)
        c = which[:, None]
        gain = tl.load(weight + one + which, which < EACH, 0.0).to(tl.float32)
        up = tl.load(bias + one + which, which < EACH, 0.0).to(tl.float32)
        total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        products = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        for p0 in range(0, PIXELS, BLOCK_P):
            inside = (c < EACH) & (p0 + p < PIXELS)
            at = here + c * stride_c + (p0 + p) * stride_p
            h = (tl.load(x + at, inside, 0.0).to(tl.float32) - m) * s
            upstream = tl.load(g + at, inside, 0.0).to(tl.float32)
            if RELU:
                upstream = tl.where(h * gain[:, None] + up[:, None] > 0.0, upstream, 0.0)
            total += upstream
            products += upstream * h
        dshift = tl.sum(total, 1)
        dgain = tl.sum(products, 1)
        row = parts + n_th * 2 * groups * EACH + group * EACH + which
        tl.store(row, dgain, which < EACH)
        tl.store(row + groups * EACH, dshift, which < EACH)
        a += gain * dshift
        b += gain * dgain
    size = EACH * PIXELS
    a_mean = tl.sum(a, 0) / size
    b_mean = tl.sum(b, 0) / size
    for c0 in range(0, EACH, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[:, None]
        gain = tl.load(weight + one + c, c < EACH, 0.0).to(tl.float32)
        up = tl.load(bias + one + c, c < EACH, 0.0).to(tl.float32)
        for p0 in range(0, PIXELS, BLOCK_P):
            inside = (c < EACH) & (p0 + p < PIXELS)
            at = here + c * stride_c + (p0 + p) * stride_p
            h = (tl.load(x + at, inside, 0.0).to(tl.float32) - m) * s
            upstream = tl.load(g + at, inside, 0.0).to(tl.float32)
            if RELU:
                upstream = tl.where(h * gain + up > 0.0, upstream, 0.0)
            tl.store(dx + at, (upstream * gain - a_mean - h * b_mean) * s, inside)
