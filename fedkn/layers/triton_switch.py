"""Whether kernels written in Triton are used, by whatever layer has some.

FEDKN_TRITON=auto (the default) uses them for CUDA tensors where Triton is installed, 0 never,
1 always, so that its absence is an error. With TRITON_INTERPRET=1 Triton runs them on the CPU, for
tests on machines without a device.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from fedkn.errors import UserError, unknown_name

__all__ = ["load", "reaches"]


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


def reaches(device: torch.device) -> bool:
    """Whether kernels could run on tensors of `device`, if they can be had."""
    return device.type == "cuda" or _interpreted()


_WISHES = ("auto", "0", "1")


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
