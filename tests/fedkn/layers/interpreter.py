"""Triton's interpreter, made to count where its release is older than NumPy 2.4.

NumPy 2.4 makes no number of an array that has a dimension, be there one element in it, and Triton's
interpreter asked for that in every loop over `range`: 3.2 (torch 2.6) and 3.6 (torch 2.11) do, 3.9
no longer does. To be imported before a kernel is called.
"""

from __future__ import annotations

from typing import Any

import triton
from packaging.version import Version
from triton.runtime import interpreter

if Version(triton.__version__) < Version("3.9"):
    _patch_tensor = interpreter._patch_lang_tensor

    def _patch(tensor: Any, *scope: Any) -> None:
        _patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = _patch
