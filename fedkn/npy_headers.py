"""The bytes of arrays as .npy files, which is what Flower sends of each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.lib import format as npy

__all__ = ["arrays_bytes", "npy_header"]


def arrays_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Return what `record_bytes` of fedkn.federation does of these arrays' record, unmade."""
    return sum(len(npy_header(a.dtype, a.shape)) + a.nbytes for a in arrays.values())


@lru_cache(maxsize=4096)
def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return what an .npy file of an array in C order begins with; its elements follow.

    `Array` and NumPy write and parse this header anew for every array, which for the dozens of
    small tensors of a model takes longer than everything else that happens to a message.
    """
    stream = BytesIO()
    npy.write_array_header_1_0(
        stream, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()
