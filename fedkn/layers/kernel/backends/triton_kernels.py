# A kernel's arguments are pointers and numbers that only Triton types, and it has many of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: PLR0917, E741
"""The kernel-normalized convolution on CUDA devices: five Triton kernels around the convolution.

x is read once for the statistics, once more in the backward pass; the dropout mask is drawn in
registers by the generator of `fedkn.layers.kernel.dropout`, bit for bit. The equations and their
names are those of `fedkn.layers.kernel.backends.plain`.

Maps are (K, N, C, H, W) in any layout with evenly spaced pixels: addressed by strides. K clients
have filters, (K, O, C/groups, KH, KW), and keys of their own; maps of one value per position are
(K * N, POSITIONS), contiguous. What is done to the filters themselves is done by programs of its
own in launches that there are anyway.

Everything is float32. No sum cancels: values are taken about a value near their mean, so that an
error is small against their deviation, however far from zero they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedkn.layers.kernel.backends.filter_programs import finish_filter, use_filter
from fedkn.layers.kernel.mask_kernel import keep, key_of

__all__ = ["channel_sums", "epilogue", "finish_gradients", "moments", "reduce_gradient"]


@triton.jit
def _maps(client, sample, stride_k, stride_n):
    return client.to(tl.int64) * stride_k + sample.to(tl.int64) * stride_n


@triton.jit
def _places(client, sample, c, q, stride_k, stride_n, stride_c, stride_p, QUADS: tl.constexpr):
    """Where the elements (C, 4, Q) lie; QUADS: four pixels in a row may be one access."""
    before = _maps(client, sample, stride_k, stride_n)
    place = c * stride_c + (q * 4 + tl.arange(0, 4)[None, :, None]) * stride_p
    if QUADS:
        before = tl.multiple_of(before, [4])
        place = tl.multiple_of(place, [1, 4, 1])
    return before + place


@triton.jit
def _inside(c, end, q, PIXELS, ALIGNED: tl.constexpr):
    """Which of the elements (C, 4, Q) there are, for all four alike where ALIGNED: (C, 1, Q)."""
    if ALIGNED:
        inside = (c < end) & (q < PIXELS // 4)
    else:
        inside = (c < end) & (q * 4 + tl.arange(0, 4)[None, :, None] < PIXELS)
    return inside


@triton.jit(do_not_specialize=["key"])
def channel_sums(
    x, key, sums,
    N, C, PIXELS, WORDS, threshold, stride_key, stride_k, stride_n, stride_c, stride_p,
    MASKED: tl.constexpr, POINTER: tl.constexpr, ALIGNED: tl.constexpr, QUADS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Of each pixel's kept elements in a share of the channels: (SPLITS, 3, K * N, PIXELS).

    Their mean, the sum of the squares of their distances to it, and how many they are.
    """
    q = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, None, :]
    client = tl.program_id(1) // N
    sample = tl.program_id(1) % N
    split = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(C, SPLITS), BLOCK_C) * BLOCK_C
    begin = split * share
    end = tl.minimum(begin + share, C)
    c = begin + tl.arange(0, BLOCK_C)[:, None, None]
    seed = key_of(key, client, stride_key, POINTER) if MASKED else 0
    at = x + _places(client, sample, c, q, stride_k, stride_n, stride_c, stride_p, QUADS)
    value = tl.load(at, _inside(c, end, q, PIXELS, ALIGNED), 0.0).to(tl.float32)
    # About the first channels' mean sums lose no digits; the next tile is read meanwhile.
    shift = tl.sum(value, 0) / tl.maximum(tl.minimum(end - begin, BLOCK_C), 1)
    # Zeros, but of what was loaded: the mask is drawn twice where Triton spreads counts over the
    # threads in another way than values.
    kept = value * 0.0
    first = tl.zeros([BLOCK_C, 4, BLOCK_Q], tl.float32)
    squares = tl.zeros([BLOCK_C, 4, BLOCK_Q], tl.float32)
    for c0 in range(begin, end, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[:, None, None]
        taken = _inside(c, end, q, PIXELS, ALIGNED)
        if MASKED:
            taken = taken & keep(seed, sample, c, q, PIXELS, WORDS, threshold, ALIGNED)
        far = tl.where(taken, value - shift[None, :, :], 0.0)
        kept += taken.to(tl.float32)
        first += far
        squares += far * far
        c += BLOCK_C
        at = x + _places(client, sample, c, q, stride_k, stride_n, stride_c, stride_p, QUADS)
        value = tl.load(at, _inside(c, end, q, PIXELS, ALIGNED), 0.0).to(tl.float32)
    count = tl.sum(kept, 0)
    total = tl.sum(first, 0)
    mean = total / tl.maximum(count, 1.0)
    pixel = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, :] * 4
    pixel += tl.arange(0, 4)[:, None]
    step = tl.num_programs(1) * PIXELS
    out = sums + (split * 3 * step + tl.program_id(1) * PIXELS + pixel)
    tl.store(out, shift + mean, pixel < PIXELS)
    tl.store(out + step, tl.maximum(tl.sum(squares, 0) - total * mean, 0.0), pixel < PIXELS)
    tl.store(out + 2 * step, count, pixel < PIXELS)


@triton.jit
def moments(
    sums, mean, scale, weight, used, filters,
    SAMPLES, H, W, COLUMNS, POSITIONS, unit, first, excess, eps, WEIGHTS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MASKED: tl.constexpr, CENTRED: tl.constexpr, COPY: tl.constexpr, TAPS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each unit mean and 1/sqrt(var + eps); and what is needed of the filters.

    That is filters, their sums, and where COPY used, the filters as the convolution takes them:
    less their mean where CENTRED, with TAPS > 1 channels last. A program takes BLOCK positions of a
    sample, the later ones take a filter each.
    """
    tiles = tl.cdiv(POSITIONS, BLOCK)
    program = tl.program_id(0)
    if program < tiles * SAMPLES:
        _unit_moments(
            sums, mean, scale, program // tiles, program % tiles,
            SAMPLES, H, W, COLUMNS, POSITIONS, unit, first, excess, eps,
            KH, KW, SH, SW, PH, PW, DH, DW, MASKED, SPLITS, BLOCK,
        )  # fmt: skip
    else:
        use_filter(weight, used, filters, program - tiles * SAMPLES, WEIGHTS, CENTRED, COPY, TAPS)


@triton.jit
def _unit_moments(
    sums, mean, scale, n_th, tile,
    SAMPLES, H, W, COLUMNS, POSITIONS, unit, first, excess, eps,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MASKED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the k elements of a unit that are kept and no padding: their mean t, their squares B.

    B is the sum of (u - t)^2. With f and f (1 + e) of `moment_weights`, the unit's mean is f k t,
    and its variance f (1 + e) B + f k t^2 (1 + e - f k), whose last factor is (n - k) f where
    1 + e is f n, as with a mask, else e + (n - k) / n: no difference of large numbers is left.
    """
    position = tile * BLOCK + tl.arange(0, BLOCK)
    row = position // COLUMNS * SH - PH
    column = position % COLUMNS * SW - PW
    step = SAMPLES * H * W
    count = tl.zeros([BLOCK], tl.float32)
    centre = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for tap in range(KH * KW):
        h = row + tap // KW * DH
        w = column + tap % KW * DW
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (position < POSITIONS)
        for split in range(SPLITS):
            source = sums + (split * 3 * step + n_th * H * W + h * W + w)
            kept = tl.load(source + 2 * step, inside, 0.0)
            far = tl.load(source, inside, 0.0) - centre
            # Chan, Golub and LeVeque's updating formula.
            share = kept / tl.maximum(count + kept, 1.0)
            squares += tl.load(source + step, inside, 0.0) + far * far * count * share
            centre += tl.where(kept > 0.0, far * share, 0.0)
            count += kept
    gap = (unit - count) * first
    if not MASKED:
        gap += excess
    variance = first * ((1.0 + excess) * squares + count * centre * centre * gap)
    here = n_th * POSITIONS + position
    tl.store(mean + here, first * count * centre, position < POSITIONS)
    tl.store(scale + here, 1.0 / tl.sqrt(variance + eps), position < POSITIONS)


@triton.jit
def epilogue(
    z, y, mean, scale, filters, bias,
    N, O, POSITIONS, stride_k, stride_n, stride_o, stride_p,
    CENTRED: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, KEEP_Z: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """z becomes z - mean * S (written where KEEP_Z), y = z * s + bias, with ReLU where RELU."""
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    o = (tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    n_th = tl.program_id(2)
    client = n_th // N
    inside = (o < O) & (p < POSITIONS)
    place = _maps(client, n_th % N, stride_k, stride_n) + o * stride_o + p * stride_p
    value = tl.load(z + place, inside, 0.0).to(tl.float32)
    if not CENTRED:
        value -= tl.load(mean + n_th * POSITIONS + p, p < POSITIONS, 0.0) * tl.load(
            filters + client * O + o, o < O, 0.0
        )
    if KEEP_Z:
        tl.store(z + place, value, inside)
    value *= tl.load(scale + n_th * POSITIONS + p, p < POSITIONS, 0.0)
    if BIAS:
        value += tl.load(bias + client * O + o, o < O, 0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)
    tl.store(y + place, value, inside)


@triton.jit
def reduce_gradient(
    g, output, mean, scale, filters, bias, dz, maps, parts,
    N, O, POSITIONS, stride_k, stride_n, stride_o, stride_p,
    CENTRED: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, OUTPUT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One pass over g: dz, and every sum of it that the gradients need.

    maps, (SPLITS, 2, K * N, POSITIONS), gets sum_o dz * z and -sum_o dz * S of a share of the
    filters; parts, (K * N, tiles, 2, O), the sums of g (where BIAS) and of dz * mean (where not
    CENTRED) over a tile of positions. `output` is y where OUTPUT, else z.
    """
    tile = tl.program_id(0)
    p = (tile * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]
    n_th = tl.program_id(1)
    client = n_th // N
    split = tl.program_id(2)
    share = tl.cdiv(tl.cdiv(O, SPLITS), BLOCK_O) * BLOCK_O
    m = tl.load(mean + n_th * POSITIONS + p, p < POSITIONS, 0.0)
    s = tl.load(scale + n_th * POSITIONS + p, p < POSITIONS, 0.0)
    energy = tl.zeros([BLOCK_P], tl.float32)
    dmean = tl.zeros([BLOCK_P], tl.float32)
    for o0 in range(split * share, min(split * share + share, O), BLOCK_O):
        o = (o0 + tl.arange(0, BLOCK_O))[:, None]
        inside = (o < O) & (p < POSITIONS)
        place = _maps(client, n_th % N, stride_k, stride_n) + o * stride_o + p * stride_p
        upstream = tl.load(g + place, inside, 0.0).to(tl.float32)
        value = tl.load(output + place, inside, 0.0).to(tl.float32)
        if RELU:
            upstream = tl.where(value > 0.0, upstream, 0.0)
        if OUTPUT and BIAS:
            value -= tl.load(bias + client * O + o, o < O, 0.0).to(tl.float32)
        d = upstream * s
        tl.store(dz + place, d, inside)
        energy += tl.sum((upstream if OUTPUT else d) * value, 0)
        if not CENTRED:
            dmean -= tl.sum(d * tl.load(filters + client * O + o, o < O, 0.0), 0)
        which = o0 + tl.arange(0, BLOCK_O)
        row = parts + (n_th * tl.num_programs(0) + tile) * 2 * O + which
        if BIAS:
            tl.store(row, tl.sum(upstream, 1), which < O)
        if not CENTRED:
            tl.store(row + O, tl.sum(d * m, 1), which < O)
    position = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    step = tl.num_programs(1) * POSITIONS
    out = maps + (split * 2 * step + n_th * POSITIONS + position)
    tl.store(out, energy, position < POSITIONS)
    tl.store(out + step, dmean, position < POSITIONS)


@triton.jit(do_not_specialize=["key"])
def finish_gradients(
    x, dx, key, mean, scale, maps, parts, dw, out, db,
    PROGRAMS, SAMPLES, N, C, H, W, ROWS, COLUMNS, WORDS, threshold, first, excess,
    stride_key, stride_k, stride_n, stride_c, stride_p,
    dstride_k, dstride_n, dstride_c, dstride_p, O, PARTS, WEIGHTS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MASKED: tl.constexpr, POINTER: tl.constexpr, ALIGNED: tl.constexpr, QUADS: tl.constexpr,
    CENTRED: tl.constexpr, BIAS: tl.constexpr, WEIGHT: tl.constexpr, TAPS: tl.constexpr,
    SPLITS: tl.constexpr, SHARES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """What the convolution's gradients lack: dx's way through the statistics, dw's through S, db.

    The first PROGRAMS take a tile of pixels and a share of the channels, the later a filter each.
    """
    program = tl.program_id(0)
    if program < PROGRAMS:
        tiles = tl.cdiv(tl.cdiv(H * W, 4), BLOCK_Q)
        _add_through_statistics(
            x, dx, key, mean, scale, maps,
            program % tiles, program // tiles % SAMPLES, program // tiles // SAMPLES,
            SAMPLES, N, C, H, W, ROWS, COLUMNS, WORDS, threshold, first, excess,
            stride_key, stride_k, stride_n, stride_c, stride_p,
            dstride_k, dstride_n, dstride_c, dstride_p,
            KH, KW, SH, SW, PH, PW, DH, DW, MASKED, POINTER, ALIGNED, QUADS,
            SPLITS, SHARES, BLOCK_C, BLOCK_Q,
        )  # fmt: skip
    else:
        finish_filter(
            parts, dw, out, db, program - PROGRAMS, O, PARTS, WEIGHTS, CENTRED, BIAS, WEIGHT, TAPS
        )


@triton.jit
def _add_through_statistics(
    x, dx, key, mean, scale, maps, tile, n_th, part,
    SAMPLES, N, C, H, W, ROWS, COLUMNS, WORDS, threshold, first, excess,
    stride_key, stride_k, stride_n, stride_c, stride_p,
    dstride_k, dstride_n, dstride_c, dstride_p,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MASKED: tl.constexpr, POINTER: tl.constexpr, ALIGNED: tl.constexpr, QUADS: tl.constexpr,
    SPLITS: tl.constexpr, SHARES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """dx += mask * (offset + slope * x), what reaches a share of x through mean and variance.

    Both are sums over the windows that see a pixel. x is taken about a value t that is near the
    mean of its kept neighbours, and offset + slope * t is what is summed: so nothing cancels.
    """
    PIXELS = H * W
    positions = ROWS * COLUMNS
    step = SAMPLES * positions
    mean += n_th * positions
    scale += n_th * positions
    maps += n_th * positions
    pixel = (tile * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, :] * 4 + tl.arange(0, 4)[:, None]
    i = pixel // W + PH
    j = pixel % W + PW
    near = tl.minimum(i // SH, ROWS - 1) * COLUMNS + tl.minimum(j // SW, COLUMNS - 1)
    ratio = 1.0 + excess
    centre = tl.load(mean + near, pixel < PIXELS, 0.0) / ratio
    base = tl.zeros([4, BLOCK_Q], tl.float32)
    slope = tl.zeros([4, BLOCK_Q], tl.float32)
    for tap in range(KH * KW):
        h = i - tap // KW * DH
        w = j - tap % KW * DW
        inside = (h >= 0) & (w >= 0) & (h % SH == 0) & (w % SW == 0)
        inside = inside & (h // SH < ROWS) & (w // SW < COLUMNS) & (pixel < PIXELS)
        position = h // SH * COLUMNS + w // SW
        energy = tl.zeros([4, BLOCK_Q], tl.float32)
        dmean = tl.zeros([4, BLOCK_Q], tl.float32)
        for split in range(SPLITS):
            source = maps + split * 2 * step + position
            energy += tl.load(source, inside, 0.0)
            dmean += tl.load(source + step, inside, 0.0)
        s = tl.load(scale + position, inside, 0.0)
        m = tl.load(mean + position, inside, 0.0)
        curvature = energy * s * s
        base += dmean + curvature * (m - ratio * centre)
        slope += curvature
    base = (base * first)[None, :, :]
    slope = (slope * (first * ratio))[None, :, :]
    client = n_th // N
    sample = n_th % N
    q = (tile * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, None, :]
    seed = key_of(key, client, stride_key, POINTER) if MASKED else 0
    share = tl.cdiv(tl.cdiv(C, SHARES), BLOCK_C) * BLOCK_C
    begin = part * share
    end = tl.minimum(begin + share, C)
    for c0 in range(begin, end, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[:, None, None]
        inside = _inside(c, end, q, PIXELS, ALIGNED)
        at = x + _places(client, sample, c, q, stride_k, stride_n, stride_c, stride_p, QUADS)
        value = tl.load(at, inside, 0.0).to(tl.float32)
        value = base - slope * (value - centre[None, :, :])
        if MASKED:
            kept = keep(seed, sample, c, q, PIXELS, WORDS, threshold, ALIGNED)
            value = tl.where(kept, value, 0.0)
        at = dx + _places(client, sample, c, q, dstride_k, dstride_n, dstride_c, dstride_p, QUADS)
        tl.store(at, tl.load(at, inside, 0.0).to(tl.float32) + value, inside)
