"""PyTorch's switches of TF32, which is float32 with ten bits of mantissa: the old ones and the new.

Newer releases (2.11, not 2.6) have ``torch.backends.….fp32_precision`` too. Where somebody has set
one of them, to ask for ``allow_tf32`` or for the precision of products raises RuntimeError.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["convolutions_take_tf32", "put_back", "switches", "take_tf32"]

Switches = tuple[tuple[str, ...], tuple[object, ...]]


def switches() -> Switches:
    """Return how all of them are set, the new ones and the old; None of what cannot be asked."""
    new = tuple(place.fp32_precision for place in _places())
    return new, (_products(), *map(_allowed, _OLD))


def put_back(before: Switches) -> None:
    """Set them as `switches` found them."""
    new, (products, *allowed) = before
    _set_new(new)
    if isinstance(products, str) and _products() != products:
        torch.set_float32_matmul_precision(products)
    for owner, value in zip(_OLD, allowed, strict=True):
        if value is not None and _allowed(owner) != value:
            owner.allow_tf32 = value
    # The old ones have written to the new: "ieee" where there was nothing.
    _set_new(new)


def take_tf32(on: bool) -> None:
    """Let cuDNN and products of matrices on NVIDIA's GPUs take TF32, or float32 as it is."""
    for owner in _OLD:
        if _allowed(owner) is not None:
            owner.allow_tf32 = on
    if not _places():
        return
    # Where a more general one says "tf32" and an old one forbids it, the general one holds.
    cudnn: Any = torch.backends.cudnn
    for place in (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul):
        if (place.fp32_precision == "tf32") != on:
            place.fp32_precision = "tf32" if on else "ieee"


def convolutions_take_tf32() -> bool:
    """Whether cuDNN's convolutions do."""
    cudnn: Any = torch.backends.cudnn
    allowed = _allowed(cudnn)
    return cudnn.conv.fp32_precision == "tf32" if allowed is None else allowed


_OLD: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)


def _places() -> tuple[Any, ...]:
    """Return what has a new switch, the more general before its parts; nothing in old releases."""
    every: Any = torch.backends
    cudnn, mkldnn = every.cudnn, every.mkldnn
    if not hasattr(every, "fp32_precision"):
        return ()
    return (
        *(every, cudnn, cudnn.conv, cudnn.rnn, every.cuda.matmul),
        *(mkldnn, mkldnn.conv, mkldnn.rnn, mkldnn.matmul),
    )


def _set_new(values: tuple[str, ...]) -> None:
    for place, value in zip(_places(), values, strict=True):
        if place.fp32_precision != value:
            place.fp32_precision = value


def _products() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _allowed(owner: Any) -> bool | None:
    try:
        return bool(owner.allow_tf32)
    except RuntimeError:
        return None
