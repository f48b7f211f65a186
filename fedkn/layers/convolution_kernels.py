# A kernel's arguments are pointers and numbers that only Triton types, and it has many of them.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: PLR0917, E741
"""The convolution of several clients' maps, each by its own filters: two Triton kernels.

Each is a product of matrices per client that is never written down: rows are the pixels of all the
client's maps, columns its filters, and the inner dimension runs over channels and taps. Sums are
taken in one order whatever the device does beside, so the same tensors give the same bits. Maps
(K, N, C, H, W) and filters (K, O, C, KH, KW) are contiguous and float32, as are products and sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gather_product", "weight_product"]


@triton.jit
def gather_product(
    x, w, bias, y,
    N, C, H, W, O, OH, OW, stride_wo, stride_wc,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TRANSPOSED: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (K, N, O, OH, OW): the convolution of x (K, N, C, H, W), or its transpose.

    The weight of output o, channel c and tap t is at ``w + o * stride_wo + c * stride_wc + t``, so
    that the transpose reads the same filters.
    """
    client = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    positions = OH * OW
    n = row // positions
    position = row % positions
    top = position // OW
    left = position % OW
    x += client.to(tl.int64) * N * C * H * W
    w += client.to(tl.int64) * O * C * (KH * KW)
    total = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for tap in tl.static_range(KH * KW):
        if TRANSPOSED:
            far_h = top + PH - tap // KW * DH
            far_w = left + PW - tap % KW * DW
            h = far_h // SH
            wide = far_w // SW
            inside = (far_h >= 0) & (far_w >= 0) & (h < H) & (wide < W)
            inside = inside & (h * SH == far_h) & (wide * SW == far_w)
        else:
            h = top * SH - PH + tap // KW * DH
            wide = left * SW - PW + tap % KW * DW
            inside = (h >= 0) & (h < H) & (wide >= 0) & (wide < W)
        inside = inside & (n < N)
        source = n * C * H * W + h * W + wide
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            maps = tl.load(
                x + source[:, None] + c[None, :] * (H * W), inside[:, None] & (c[None, :] < C), 0.0
            )
            filters = tl.load(
                w + o[None, :] * stride_wo + c[:, None] * stride_wc + tap,
                (o[None, :] < O) & (c[:, None] < C),
                0.0,
            )
            total = tl.dot(maps, filters, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + client * O + o, o < O, 0.0)[None, :]
    y += client.to(tl.int64) * N * O * positions
    tl.store(
        y + (n * O * positions + position)[:, None] + o[None, :] * positions,
        total,
        (n < N)[:, None] & (o[None, :] < O),
    )


@triton.jit
def weight_product(
    x, g, parts,
    N, C, H, W, O, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """parts (SPLITS, K, O, C * KH * KW): the filters' gradient, over a share of the pixels each.

    x (K, N, C, H, W) are the maps, g (K, N, O, OH, OW) the gradient of what was made of them.
    """
    columns = C * KH * KW
    tiles = tl.cdiv(columns, BLOCK_C)
    o = tl.program_id(0) // tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    column = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    client = tl.program_id(2)
    c = column // (KH * KW)
    tap = column % (KH * KW)
    down = tap // KW * DH - PH
    across = tap % KW * DW - PW
    positions = OH * OW
    rows = N * positions
    share = tl.cdiv(tl.cdiv(rows, SPLITS), BLOCK_M) * BLOCK_M
    x += client.to(tl.int64) * N * C * H * W
    g += client.to(tl.int64) * N * O * positions
    total = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for first in range(split * share, min(split * share + share, rows), BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        n = row // positions
        position = row % positions
        upstream = tl.load(
            g + (n * O * positions + position)[None, :] + o[:, None] * positions,
            (row < rows)[None, :] & (o < O)[:, None],
            0.0,
        )
        h = (position // OW * SH)[:, None] + down[None, :]
        wide = (position % OW * SW)[:, None] + across[None, :]
        inside = (h >= 0) & (h < H) & (wide >= 0) & (wide < W)
        inside = inside & (row < rows)[:, None] & (column < columns)[None, :]
        maps = tl.load(
            x + (n * C * H * W)[:, None] + (c * (H * W))[None, :] + h * W + wide, inside, 0.0
        )
        total = tl.dot(upstream, maps, total, input_precision="ieee")
    out = parts + (split * tl.num_programs(2) + client).to(tl.int64) * O * columns
    tl.store(
        out + o[:, None] * columns + column[None, :],
        total,
        (o < O)[:, None] & (column < columns)[None, :],
    )
