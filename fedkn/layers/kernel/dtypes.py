"""In which dtype statistics are taken, and casts that cost nothing where there is nothing to do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "cast", "undisturbed", "wide"]

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the statistics for inputs of `dtype`: float32 at least."""
    return _WIDE.get(dtype, dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Do what `x.to(dtype)` does, without calling torch where that is nothing: a microsecond."""
    return x if x.dtype == dtype else x.to(dtype)


def undisturbed(device: str) -> AbstractContextManager[object]:
    """Return the context in which autocast changes no dtype on a type of device.

    Some know no autocast, as "meta" does, and torch raises where it is switched off for them.
    """
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast would convolve `x`; None where it is off, or lets it be.

    Float64 is let be.
    """
    if not torch._C._is_any_autocast_enabled() or x.dtype == torch.float64:
        return None
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
