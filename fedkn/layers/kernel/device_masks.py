"""Masks drawn on a GPU by one launch, for one client or for all of a vmap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch

from fedkn.layers import triton_switch
from fedkn.layers.side_by_side import outside, put_back
from fedkn.layers.triton_launch import launch

__all__ = ["draw_lanes", "serves"]


def serves(key: int | Tensor, device: torch.device) -> bool:
    """Whether masks of `key` on `device` can be drawn so: under no transform but one vmap."""
    if device.type != "cuda" or not triton_switch.load() or torch.compiler.is_compiling():
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    stack = _functorch.get_interpreter_stack()
    if stack is None:
        return True
    return len(stack) == 1 and isinstance(key, Tensor) and _functorch.is_batchedtensor(key)


def draw_lanes(
    key: int | Tensor, words: int, level: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the lanes of `words` words as zeros and ones, (4 * words,), of `dtype`.

    Every lane is zero with probability ``level / LEVELS``, as in `keep_mask`.
    Under a vmap each client has its own `key`.
    """
    if isinstance(key, int):
        key = torch.full((), key, dtype=torch.int64, device=device)
    if not _functorch.is_batchedtensor(key):
        return drawn(key.to(device).reshape(1), words, level, dtype)[0]
    inner = _functorch.get_unwrapped(key)
    with outside():
        lanes = drawn(inner.to(device).contiguous(), words, level, dtype)
    return put_back(lanes, 0)


def drawn(keys: Tensor, words: int, level: int, dtype: torch.dtype) -> Tensor:
    """Return the lanes of each of `keys` (K,), int64: (K, 4 * words)."""
    from fedkn.layers.kernel import mask_kernel  # noqa: PLC0415 - Triton is optional

    lanes = torch.empty((len(keys), 4 * words), dtype=dtype, device=keys.device)
    if words:
        grid = (-(-words // _BLOCK), len(keys))
        launch(mask_kernel.draw_masks, grid, keys, lanes, words, level, BLOCK=_BLOCK)
    return lanes


_BLOCK = 256
