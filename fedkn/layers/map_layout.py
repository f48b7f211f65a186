"""How maps lie in memory, for kernels that address them by strides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MOST", "Maps", "cdiv", "dense", "fits", "in_one_piece", "laid_out_as", "maps_of"]

MOST = 2**16 - 1
"""Samples, of all clients, that a launch on a GPU can tell apart: CUDA's second and third axis."""


class Maps(NamedTuple):
    """How maps (N, C, H, W) or (K, N, C, H, W) lie in memory."""

    clients: int
    samples: int
    channels: int
    size: tuple[int, int]
    strides: tuple[int, int, int, int]
    """Of clients, samples, channels and pixels."""

    @staticmethod
    def of(x: Tensor) -> Maps | None:
        """Return it for `x`, None where the pixels are not evenly spaced."""
        *clients, samples, channels, height, width = x.shape
        *apart, stride_n, stride_c, stride_h, stride_w = x.stride()
        if height != 1 and width != 1 and stride_h != stride_w * width:
            return None
        stride_p = stride_w if width > 1 else stride_h
        strides = (apart[0] if apart else 0, stride_n, stride_c, stride_p)
        return Maps(clients[0] if clients else 1, samples, channels, (height, width), strides)

    @property
    def all(self) -> int:
        """The samples of all clients."""
        return self.clients * self.samples

    @property
    def pixels(self) -> int:
        """Of a map."""
        return self.size[0] * self.size[1]

    @property
    def _last(self) -> bool:
        return self.strides[2] == 1 and self.channels > 1

    def blocks(self) -> tuple[int, int]:
        """Channels and pixels of a tile: long in the direction in which memory is contiguous."""
        return (32, 32) if self._last else (8, 128)

    def tile(self) -> tuple[int, int]:
        """Channels, and pixels in fours, of a tile of 2048 values: 16 for each of 128 threads."""
        channels, quads = _power(self.channels), _power(cdiv(self.pixels, 4))
        if self._last:
            block_c = min(128, channels)
            return block_c, min(512 // block_c, quads)
        block_q = min(64, quads)
        return min(512 // block_q, channels), block_q

    def group_blocks(self, each: int) -> dict[str, int]:
        """Channels and pixels of a tile of 2048 values in a group of `each` channels."""
        block_c = min(_power(each), 128 if self._last else 16)
        return {"BLOCK_C": block_c, "BLOCK_P": min(2048 // block_c, _power(self.pixels))}

    def quads(self, x: Tensor) -> bool:
        """Whether four pixels of `x` in a row are in one piece, which begins where one may."""
        aligned = not any(stride % 4 for stride in self.strides[:3]) and x.data_ptr() % 16 == 0
        return self.strides[3] == 1 and self.pixels % 4 == 0 and aligned


def maps_of(x: Tensor) -> Maps:
    """Return how `x` lies in memory, whose pixels are evenly spaced."""
    maps = Maps.of(x)
    assert maps is not None
    return maps


def fits(x: Tensor, clients: int = 1) -> bool:
    """Whether maps (N, C, H, W), of each of so many clients, have no more samples than `MOST`."""
    return clients * x.shape[0] <= MOST


def dense(x: Tensor) -> Tensor:
    """Return `x` with evenly spaced pixels."""
    return x if Maps.of(x) is not None else x.contiguous()


def in_one_piece(x: Tensor) -> Tensor:
    """Return `x` with evenly spaced pixels, and nothing else in its memory: like `empty_like`'s."""
    own = Maps.of(x) is not None and torch.empty_like(x, device="meta").stride() == x.stride()
    return x if own else x.contiguous()


def laid_out_as(g: Tensor, like: Tensor) -> Tensor:
    """Return `g` with the strides of `like`, which has its shape and lies in one piece."""
    if g.stride() == like.stride():
        return g
    return torch.empty_like(like).copy_(g)


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def _power(number: int) -> int:
    """Return the least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
