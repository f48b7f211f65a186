"""How tensors are put into messages, which depends on how these travel."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid

from fedkn.federation import arrays_record, packed

__all__ = ["sent_through"]


def sent_through(grid: Grid, arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Return `arrays` as a record to be sent through `grid`: packed, if to deployed nodes."""
    record = arrays_record(arrays)
    return packed(record) if isinstance(grid, HttpGrid) and record else record
