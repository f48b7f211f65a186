"""Whether kernels written in Triton are used, by whatever layer has some.

FEDKN_TRITON=auto (the default) uses them for CUDA tensors where Triton is installed, 0 never,
1 always, so that its absence is an error.
"""

from __future__ import annotations

import functools
import importlib.util
import os

from fedkn.errors import UserError, unknown_name

__all__ = ["load"]


@functools.cache
def load() -> bool:
    """Say whether the kernels can be used.

    Raises UserError if FEDKN_TRITON is none of auto, 0 and 1, or if it is 1 without Triton.
    """
    wish = os.environ.get("FEDKN_TRITON", "auto")
    if wish not in _WISHES:
        raise unknown_name("FEDKN_TRITON", wish, _WISHES)
    found = importlib.util.find_spec("triton") is not None
    if wish == "1" and not found:
        raise UserError("FEDKN_TRITON=1, but Triton is not installed: pip install triton")
    return found and wish != "0"


_WISHES = ("auto", "0", "1")
