# A kernel's arguments are pointers and numbers that only Triton types, and it has many of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: PLR0917, E741
"""The kernel-normalized convolution on CUDA devices: five Triton kernels around the convolution.

x is read once for the statistics, once more in the backward pass; the dropout mask is drawn in
registers by the generator of `fedkn.layers.kernel.dropout`, bit for bit. The equations and their
names are those of `fedkn.layers.kernel.backends.plain`. Any dense layout is served, channels_last
among them: a map is addressed by its sample, channel and pixel strides. Sums that cancel are taken
in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_through_statistics", "channel_sums", "epilogue", "moments", "reduce_gradient"]


@triton.jit
def _keep(key, sample, c, p, PIXELS, WORDS, threshold, ALIGNED: tl.constexpr):
    """Mask of the elements (c, p), a column and a row of indices; p has a multiple of 4 entries."""
    if ALIGNED:
        # Four neighbours in a row share a word: draw it once, then take it apart.
        rows: tl.constexpr = c.shape[0]
        columns: tl.constexpr = p.shape[1]
        first = tl.max(tl.reshape(p, [1, columns // 4, 4]), axis=2) - 3
        word = _splitmix(key, sample, (c * PIXELS + first) // 4, WORDS)
        shift = (tl.arange(0, 4) * 16).to(tl.uint64)
        lanes = (word[:, :, None] >> shift[None, None, :]) & 0xFFFF
        lanes = tl.reshape(lanes, [rows, columns])
    else:
        element = c * PIXELS + p
        word = _splitmix(key, sample, element // 4, WORDS)
        lanes = (word >> ((element % 4) * 16).to(tl.uint64)) & 0xFFFF
    # The lanes are int16 to the generator: its order is that of the lane plus 2^15, modulo 2^16.
    return ((lanes.to(tl.int32) + 32768) & 0xFFFF) >= threshold


@triton.jit
def _splitmix(key, sample, index, WORDS):
    counter = (index.to(tl.int64) + sample.to(tl.int64) * WORDS + 1).to(tl.uint64)
    z = key + counter * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _seed(key, POINTER: tl.constexpr):
    value = tl.load(key) if POINTER else key
    return value.to(tl.int64).to(tl.uint64, bitcast=True)


@triton.jit
def _weights(n, level, MASKED: tl.constexpr):
    """`fedkn.layers.kernel.statistics.moment_weights`; in float64, which a launch cannot pass."""
    n = tl.full([1], 1.0, tl.float64) * n
    kept = 65536 - level
    if MASKED:
        first = 65536 / (n * kept)
        second = first / kept * 65536
    else:
        first = 1 / n
        second = (1 + level / (tl.full([1], 1.0, tl.float64) * kept) * (1 - first)) * first
    return first, second


@triton.jit(do_not_specialize=["key"])
def channel_sums(
    x, key, sums,
    C, PIXELS, WORDS, threshold, stride_n, stride_c, stride_p,
    MASKED: tl.constexpr, POINTER: tl.constexpr, ALIGNED: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums of x * mask and of its square over a share of the channels: (SPLITS, N, 2, PIXELS)."""
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    n = tl.program_id(1)
    split = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(C, SPLITS), BLOCK_C) * BLOCK_C
    seed = _seed(key, POINTER) if MASKED else 0
    total = tl.zeros([BLOCK_P], tl.float64)
    squares = tl.zeros([BLOCK_P], tl.float64)
    for c0 in range(split * share, min(split * share + share, C), BLOCK_C):
        c = (c0 + tl.arange(0, BLOCK_C))[:, None]
        inside = (c < C) & (p < PIXELS)
        v = tl.load(x + n.to(tl.int64) * stride_n + c * stride_c + p * stride_p, inside, 0.0)
        v = v.to(tl.float64)
        if MASKED:
            v = tl.where(_keep(seed, n, c, p, PIXELS, WORDS, threshold, ALIGNED), v, 0.0)
        total += tl.sum(v, 0)
        squares += tl.sum(v * v, 0)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    out = sums + (split * tl.num_programs(1) + n) * 2 * PIXELS + pixel
    tl.store(out, total, pixel < PIXELS)
    tl.store(out + PIXELS, squares, pixel < PIXELS)


@triton.jit
def moments(
    sums, mean, scale,
    H, W, COLUMNS, POSITIONS, unit, level, eps,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MASKED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Box filter over the sums, then mean and 1/sqrt(var + eps): (N, POSITIONS) each."""
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(1)
    row = position // COLUMNS * SH - PH
    column = position % COLUMNS * SW - PW
    total = tl.zeros([BLOCK_P], tl.float64)
    squares = tl.zeros([BLOCK_P], tl.float64)
    for tap in range(KH * KW):
        h = row + tap // KW * DH
        w = column + tap % KW * DW
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (position < POSITIONS)
        for split in range(SPLITS):
            source = sums + (split * tl.num_programs(1) + n) * 2 * H * W + h * W + w
            total += tl.load(source, inside, 0.0)
            squares += tl.load(source + H * W, inside, 0.0)
    first, second = _weights(unit, level, MASKED)
    m = total * first
    variance = tl.maximum(squares * second - m * m, 0.0).to(tl.float32)
    here = n * POSITIONS + position
    tl.store(mean + here, m.to(tl.float32), position < POSITIONS)
    tl.store(scale + here, 1.0 / tl.sqrt(variance + eps), position < POSITIONS)


@triton.jit
def epilogue(
    z, y, mean, scale, filters, bias,
    O, POSITIONS, stride_n, stride_o, stride_p,
    CENTRED: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, KEEP_Z: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """z becomes z - mean * S (written where KEEP_Z), y = z * s + bias, with ReLU where RELU."""
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    o = (tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    n = tl.program_id(2)
    inside = (o < O) & (p < POSITIONS)
    place = n.to(tl.int64) * stride_n + o * stride_o + p * stride_p
    value = tl.load(z + place, inside, 0.0).to(tl.float32)
    if not CENTRED:
        value -= tl.load(mean + n * POSITIONS + p, p < POSITIONS, 0.0) * tl.load(
            filters + o, o < O, 0.0
        )
    if KEEP_Z:
        tl.store(z + place, value, inside)
    value *= tl.load(scale + n * POSITIONS + p, p < POSITIONS, 0.0)
    if BIAS:
        value += tl.load(bias + o, o < O, 0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)
    tl.store(y + place, value, inside)


@triton.jit
def reduce_gradient(
    g, output, mean, scale, filters, bias, dz, maps, filter_sums,
    O, POSITIONS, stride_n, stride_o, stride_p,
    CENTRED: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, OUTPUT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One pass over g: dz, and every sum of it that the gradients need.

    maps, (SPLITS, N, 2, POSITIONS), gets sum_o dz * z and -sum_o dz * S of a share of the filters;
    filter_sums, (N, tiles, 2, O), the sums of g and of dz * mean over a tile of positions. `output`
    is y where OUTPUT, else z.
    """
    tile = tl.program_id(0)
    p = (tile * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    n = tl.program_id(1)
    split = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(O, SPLITS), BLOCK_O) * BLOCK_O
    m = tl.load(mean + n * POSITIONS + p, p < POSITIONS, 0.0)
    s = tl.load(scale + n * POSITIONS + p, p < POSITIONS, 0.0)
    energy = tl.zeros([BLOCK_P], tl.float32)
    dmean = tl.zeros([BLOCK_P], tl.float32)
    for o0 in range(split * share, min(split * share + share, O), BLOCK_O):
        o = (o0 + tl.arange(0, BLOCK_O))[:, None]
        inside = (o < O) & (p < POSITIONS)
        place = n.to(tl.int64) * stride_n + o * stride_o + p * stride_p
        upstream = tl.load(g + place, inside, 0.0).to(tl.float32)
        value = tl.load(output + place, inside, 0.0).to(tl.float32)
        if RELU:
            upstream = tl.where(value > 0.0, upstream, 0.0)
        if OUTPUT and BIAS:
            value -= tl.load(bias + o, o < O, 0.0).to(tl.float32)
        d = upstream * s
        tl.store(dz + place, d, inside)
        energy += tl.sum((upstream if OUTPUT else d) * value, 0)
        if not CENTRED:
            dmean -= tl.sum(d * tl.load(filters + o, o < O, 0.0), 0)
        which = o0 + tl.arange(0, BLOCK_O)
        row = filter_sums + (n * tl.num_programs(0) + tile) * 2 * O + which
        tl.store(row, tl.sum(upstream, 1), which < O)
        tl.store(row + O, tl.sum(d * m, 1), which < O)
    position = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    out = maps + (split * tl.num_programs(1) + n) * 2 * POSITIONS + position
    tl.store(out, energy, position < POSITIONS)
    tl.store(out + POSITIONS, dmean, position < POSITIONS)


@triton.jit(do_not_specialize=["key"])
def add_through_statistics(
    x, dx, key, mean, scale, maps,
    C, H, W, ROWS, COLUMNS, WORDS, threshold, unit,
    stride_n, stride_c, stride_p, dstride_n, dstride_c, dstride_p,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MASKED: tl.constexpr, POINTER: tl.constexpr, ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx += mask * (offset + slope * x): what reaches a share of x through mean and variance."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(1)
    positions = ROWS * COLUMNS
    first, second = _weights(unit, threshold, MASKED)
    offset = tl.zeros([BLOCK_P], tl.float64)
    slope = tl.zeros([BLOCK_P], tl.float64)
    for tap in range(KH * KW):
        i = pixel // W + PH - tap // KW * DH
        j = pixel % W + PW - tap % KW * DW
        inside = (i >= 0) & (j >= 0) & (i % SH == 0) & (j % SW == 0)
        inside = inside & (i // SH < ROWS) & (j // SW < COLUMNS) & (pixel < H * W)
        position = i // SH * COLUMNS + j // SW
        energy = tl.zeros([BLOCK_P], tl.float64)
        dmean = tl.zeros([BLOCK_P], tl.float64)
        for split in range(SPLITS):
            source = maps + (split * tl.num_programs(1) + n) * 2 * positions + position
            energy += tl.load(source, inside, 0.0).to(tl.float64)
            dmean += tl.load(source + positions, inside, 0.0).to(tl.float64)
        s = tl.load(scale + n * positions + position, inside, 0.0).to(tl.float64)
        m = tl.load(mean + n * positions + position, inside, 0.0).to(tl.float64)
        curvature = energy * s * s
        offset += (dmean + curvature * m) * first
        slope -= curvature * second
    p = pixel[None, :]
    seed = _seed(key, POINTER) if MASKED else 0
    share = tl.cdiv(tl.cdiv(C, SHARES), BLOCK_C) * BLOCK_C
    begin = tl.program_id(2) * share
    for c0 in range(begin, min(begin + share, C), BLOCK_C):
        c = (c0 + tl.arange(0, BLOCK_C))[:, None]
        inside = (c < C) & (p < H * W)
        at = n.to(tl.int64) * stride_n + c * stride_c + p * stride_p
        v = tl.load(x + at, inside, 0.0).to(tl.float64)
        v = (offset[None, :] + slope[None, :] * v).to(tl.float32)
        if MASKED:
            v = tl.where(_keep(seed, n, c, p, H * W, WORDS, threshold, ALIGNED), v, 0.0)
        at = n.to(tl.int64) * dstride_n + c * dstride_c + p * dstride_p
        tl.store(dx + at, tl.load(dx + at, inside, 0.0).to(tl.float32) + v, inside)
