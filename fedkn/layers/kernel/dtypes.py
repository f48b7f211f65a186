"""In which dtype statistics are taken, and casts that cost nothing where there is nothing to do."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cast", "wide"]

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the statistics for inputs of `dtype`: float32 at least."""
    return _WIDE.get(dtype, dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Do what `x.to(dtype)` does, without calling torch where that is nothing: a microsecond."""
    return x if x.dtype == dtype else x.to(dtype)
