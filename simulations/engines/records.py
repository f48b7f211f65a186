"""What clients are asked and answer, as plain values and bytes, between processes of a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedkn.data.summary import DataSummary
from fedkn.direct import Asked, Trained
from fedkn.stack import Flat, Layout

__all__ = ["Bytes", "Content", "Packed", "copied", "pack", "unpack", "unpacked_records"]

Content = RecordDict | Asked | Trained
"""A message's, or the same without one."""

Read = Callable[[int, int], bytes]


class _PackedFlat(NamedTuple):
    layout: Layout
    places: list[tuple[int, int]]


class _PackedAsked(NamedTuple):
    told: dict[str, Any]
    data: DataSummary
    sent: _PackedFlat
    control: _PackedFlat | None


class _PackedTrained(NamedTuple):
    metrics: dict[str, int | float]
    tensors: _PackedFlat | dict[str, Tensor]


class _PackedRecords(NamedTuple):
    records: list[tuple[str, str, Any]]


Packed = _PackedRecords | _PackedAsked | _PackedTrained


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


def pack(content: Content, data: Bytes) -> Packed:
    """Return `content` as plain values; the bytes of its arrays go into `data`."""
    if isinstance(content, Asked):
        control = None if content.control is None else _flat(content.control, data)
        return _PackedAsked(content.told, content.data, _flat(content.sent, data), control)
    if isinstance(content, Trained):
        tensors = content.tensors
        flat = _flat(tensors, data) if isinstance(tensors, Flat) else dict(tensors)
        return _PackedTrained(content.metrics, flat)
    packed: list[tuple[str, str, Any]] = []
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
    return _PackedRecords(packed)


def unpack(packed: Packed, read: Read, device: torch.device | None = None) -> Content:
    """Return what `pack` was given; ``read(offset, length)`` returns bytes of the data.

    What clients are asked without a message is put on their `device` if one is given, once for all
    that are asked the same.
    """
    if isinstance(packed, _PackedAsked):
        sent = _shared(*_data(packed.sent, read), device)
        control = None if packed.control is None else _shared(*_data(packed.control, read), device)
        return Asked(dict(packed.told), packed.data, sent, control)
    if isinstance(packed, _PackedTrained):
        tensors = packed.tensors
        if isinstance(tensors, _PackedFlat):
            return Trained(packed.metrics, Flat.read(*_data(tensors, read)))
        return Trained(packed.metrics, tensors)
    return unpacked_records(packed, read)


def unpacked_records(packed: Packed, read: Read) -> RecordDict:
    """Return the records of a message, or of a client's state, that `pack` was given."""
    assert isinstance(packed, _PackedRecords)
    content = RecordDict()
    for name, kind, values in packed.records:
        if kind == "arrays":
            content[name] = _arrays(
                (key, dtype, shape, stype, read(offset, length))
                for key, dtype, shape, stype, offset, length in values
            )
        else:
            content[name] = _record(kind == "metrics", values)
    return content


def copied(content: Content) -> Content:
    """Return a copy of a message's content, as the other end of a wire would get it.

    The bytes of arrays are immutable and shared; everything that can be changed is new.
    """
    if isinstance(content, Asked):
        return content.copied()
    assert isinstance(content, RecordDict)
    own = content.copy()
    for name, record in content.items():
        # By copy(), which does not check again what a record would not hold if it were wrong.
        one: Any = record.copy()
        for key, value in record.items():
            if isinstance(value, Array | list):
                one[key] = copy(value)
        own[name] = one
    return own


def _flat(flat: Flat, data: Bytes) -> _PackedFlat:
    return _PackedFlat(flat.layout, [(data.place(part), len(part)) for part in flat.data])


def _data(packed: _PackedFlat, read: Read) -> tuple[Layout, tuple[bytes, ...]]:
    return packed.layout, tuple(read(offset, length) for offset, length in packed.places)


@lru_cache(maxsize=2)
def _shared(layout: Layout, data: tuple[bytes, ...], device: torch.device | None) -> Flat:
    flat = Flat.read(layout, data)
    return flat if device is None else flat.to(device)


def _arrays(arrays: Iterable[tuple[str, str, tuple[int, ...], str, bytes]]) -> ArrayRecord:
    # One by one: given a dictionary, ArrayRecord makes every Array again.
    record = ArrayRecord()
    for key, dtype, shape, stype, data in arrays:
        record[key] = Array(dtype, shape, stype, data)
    return record


def _record(metrics: bool, values: Mapping[str, Any]) -> MetricRecord | ConfigRecord:
    own = {key: list(v) if isinstance(v, list) else v for key, v in values.items()}
    return MetricRecord(own) if metrics else ConfigRecord(own)
