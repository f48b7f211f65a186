# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: PLR0917
"""The dropout masks of `fedkn.layers.kernel.dropout` on a GPU, bit for bit, for Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["draw_masks", "keep", "key_of"]


@triton.jit
def draw_masks(keys, out, WORDS, threshold, BLOCK: tl.constexpr):
    """out (K, 4 * WORDS): zeros and ones for the words 1 to WORDS of each of K keys."""
    client = tl.program_id(1)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = _splitmix(key_of(keys, client, 1, True), word.to(tl.int64) + 1)
    place = out + (client.to(tl.int64) * WORDS + word) * 4
    for lane in tl.static_range(4):
        kept = _kept((bits >> (16 * lane)) & 0xFFFF, threshold)
        tl.store(place + lane, kept.to(out.dtype.element_ty), word < WORDS)


@triton.jit
def keep(key, sample, c, q, PIXELS, WORDS, threshold, ALIGNED: tl.constexpr):
    """Mask (C, 4, Q) of the elements of the channels c (C, 1, 1), four for each of q (1, 1, Q).

    The maps are (samples, C, PIXELS), and a sample takes WORDS words. ALIGNED: PIXELS is a multiple
    of four, so that those four share a word, which is drawn once for them.
    """
    lane = tl.arange(0, 4)[None, :, None]
    before = sample.to(tl.int64) * WORDS + 1
    if ALIGNED:
        bits = _splitmix(key, (c * (PIXELS // 4) + q).to(tl.int64) + before)
        lanes = bits >> (lane * 16).to(tl.uint64)
    else:
        element = c * PIXELS + q * 4 + lane
        bits = _splitmix(key, (element // 4).to(tl.int64) + before)
        lanes = bits >> ((element % 4) * 16).to(tl.uint64)
    return _kept(lanes & 0xFFFF, threshold)


@triton.jit
def key_of(key, client, stride, POINTER: tl.constexpr):
    """The client's key: a number, or where POINTER in memory, `stride` apart."""
    value = tl.load(key + client * stride) if POINTER else key
    return value.to(tl.int64).to(tl.uint64, bitcast=True)


@triton.jit
def _splitmix(key, counter):
    z = key + counter.to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _kept(lanes, threshold):
    # The lanes are int16 to the generator: its order is that of the lane plus 2^15, modulo 2^16.
    return ((lanes.to(tl.int32) + 32768) & 0xFFFF) >= threshold
