"""Dropout masks by NumPy, for CPUs: it has the unsigned shifts that torch lacks.

The generator is that of `fedkn.layers.kernel.dropout`; this is twice as fast as its torch
operations. A mask can be kept in bits, a 32nd of a float32 map, and unpacked in a fifth of the time
that it takes to draw it.
"""

from __future__ import annotations

import functools
import threading

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["GAMMA", "LEVELS", "MIX", "draw_lanes", "draw_lanes_and_bits", "unpack_lanes"]

LEVELS = 1 << 16
"""A drop probability is a multiple of 1/LEVELS, exact in the scale 1/(1-p) as well."""

GAMMA = 0x9E3779B97F4A7C15
"""What SplitMix64 adds to its counter."""

MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""What SplitMix64 multiplies by, between shifts by 30, 27 and 31."""


def draw_lanes(key: int, words: int, level: int) -> Tensor:
    """Return `words` words of the generator as a mask of zeros and ones, float32 (4 * words,).

    A lane is zero with probability `level`/LEVELS.
    """
    return _draw(key, words, level, None)


def draw_lanes_and_bits(key: int, words: int, level: int) -> tuple[Tensor, Tensor]:
    """Return `draw_lanes`, and the same in bits for `unpack_lanes`: uint8, eight lanes each."""
    bits = np.empty(-(-words // 2), dtype=np.uint8)
    return _draw(key, words, level, bits), torch.from_numpy(bits)


def unpack_lanes(bits: Tensor, words: int) -> Tensor:
    """Return the float32 mask, (4 * words,), that `draw_lanes_and_bits` returned with `bits`."""
    packed, lanes = bits.numpy(), 4 * words
    keep = np.empty(lanes, dtype=np.float32)
    for start in range(0, len(packed), _CHUNK):
        some = np.unpackbits(packed[start : start + _CHUNK])
        keep[8 * start : 8 * (start + _CHUNK)] = some[: lanes - 8 * start]
    return torch.from_numpy(keep)


_CHUNK = 1 << 14  # words or bytes at once, so that the scratch memory stays in a processor's cache
_SHIFTS = tuple(np.uint64(bits) for bits in (30, 27, 31))
_FACTORS = tuple(np.uint64(factor) for factor in MIX)


class _Scratch(threading.local):
    """Kept between calls: fresh memory would cost more than what is done in it."""

    def __init__(self) -> None:
        self.z = np.empty(_CHUNK, dtype=np.uint64)
        self.shifted = np.empty(_CHUNK, dtype=np.uint64)
        self.kept = np.empty(4 * _CHUNK, dtype=np.bool_)


_scratch = _Scratch()


@functools.cache
def _counters() -> npt.NDArray[np.uint64]:
    return np.arange(1, _CHUNK + 1, dtype=np.uint64) * np.uint64(GAMMA)


def _draw(key: int, words: int, level: int, bits: npt.NDArray[np.uint8] | None) -> Tensor:
    keep = np.empty(4 * words, dtype=np.float32)
    threshold = np.int16(level - LEVELS // 2)
    counters = _counters()
    for start in range(0, words, _CHUNK):
        size = min(_CHUNK, words - start)
        z, shifted, kept = _scratch.z[:size], _scratch.shifted[:size], _scratch.kept[: 4 * size]
        np.add(counters[:size], np.uint64((key + start * GAMMA) % 2**64), out=z)
        np.right_shift(z, _SHIFTS[0], out=shifted)
        for shift, factor in zip(_SHIFTS[1:], _FACTORS, strict=True):
            np.bitwise_xor(z, shifted, out=z)
            np.multiply(z, factor, out=z)
            np.right_shift(z, shift, out=shifted)
        np.bitwise_xor(z, shifted, out=z)
        np.greater_equal(z.view(np.int16), threshold, out=kept)
        keep[4 * start : 4 * (start + size)] = kept
        if bits is not None:
            bits[start // 2 : -(-(start + size) // 2)] = np.packbits(kept)
    return torch.from_numpy(keep)
