# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The dropout masks of `fedkn.layers.kernel.dropout` on a GPU, bit for bit: one Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["draw_masks"]


@triton.jit
def draw_masks(keys, out, WORDS, threshold, BLOCK: tl.constexpr):
    """out (K, 4 * WORDS): zeros and ones for the words 1 to WORDS of each of K keys."""
    client = tl.program_id(1)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counter = (word + 1).to(tl.int64).to(tl.uint64, bitcast=True)
    key = tl.load(keys + client).to(tl.uint64, bitcast=True)
    z = key + counter * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    place = out + (client.to(tl.int64) * WORDS + word) * 4
    for lane in tl.static_range(4):
        value = ((z >> (16 * lane)) & 0xFFFF).to(tl.int32)
        # The lanes are int16: their order is that of the lane plus 2^15, modulo 2^16.
        keep = ((value + 32768) & 0xFFFF) >= threshold
        tl.store(place + lane, keep.to(out.dtype.element_ty), word < WORDS)
