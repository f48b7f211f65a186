"""A message's records as plain values and bytes, for the way between two processes of a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

__all__ = ["Bytes", "copied", "pack", "unpack"]

Packed = list[tuple[str, str, Any]]


class Bytes:
    """Collects bytes, each object once, and says where in the whole they begin."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.size = 0
        self._places: dict[int, int] = {}

    def place(self, data: bytes) -> int:
        """Add `data` unless this very object is in already; return its offset."""
        key = id(data)
        if key not in self._places:
            # Held in `pieces`, so no other object can take its id.
            self.pieces.append(data)
            self._places[key] = self.size
            self.size += len(data)
        return self._places[key]


def pack(content: RecordDict, data: Bytes) -> Packed:
    """Return `content` as plain values; the bytes of its arrays go into `data`."""
    packed: Packed = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays = [
                (key, a.dtype, tuple(a.shape), a.stype, data.place(a.data), len(a.data))
                for key, a in record.items()
            ]
            packed.append((name, "arrays", arrays))
        elif isinstance(record, MetricRecord):
            packed.append((name, "metrics", dict(record)))
        else:
            packed.append((name, "config", dict(record)))
    return packed


def unpack(packed: Packed, read: Callable[[int, int], bytes]) -> RecordDict:
    """Return what `pack` was given; ``read(offset, length)`` returns bytes of the data."""
    content = RecordDict()
    for name, kind, values in packed:
        if kind == "arrays":
            content[name] = _arrays(
                (key, dtype, shape, stype, read(offset, length))
                for key, dtype, shape, stype, offset, length in values
            )
        else:
            content[name] = _record(kind == "metrics", values)
    return content


def copied(content: RecordDict) -> RecordDict:
    """Return a copy of a message's content, as the other end of a wire would get it.

    The bytes of arrays are immutable and shared; everything that can be changed is new.
    """
    own = content.copy()
    for name, record in content.items():
        # By copy(), which does not check again what a record would not hold if it were wrong.
        one: Any = record.copy()
        for key, value in record.items():
            if isinstance(value, Array | list):
                one[key] = copy(value)
        own[name] = one
    return own


def _arrays(arrays: Iterable[tuple[str, str, tuple[int, ...], str, bytes]]) -> ArrayRecord:
    # One by one: given a dictionary, ArrayRecord makes every Array again.
    record = ArrayRecord()
    for key, dtype, shape, stype, data in arrays:
        record[key] = Array(dtype, shape, stype, data)
    return record


def _record(metrics: bool, values: Mapping[str, Any]) -> MetricRecord | ConfigRecord:
    own = {key: list(v) if isinstance(v, list) else v for key, v in values.items()}
    return MetricRecord(own) if metrics else ConfigRecord(own)
