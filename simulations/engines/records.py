"""What clients are asked and answer, as plain values and bytes, between processes of a machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from clients.local_state import Kept
from fedkn.data.summary import DataSummary
from fedkn.direct import Asked, Trained
from fedkn.stack import Flat, Layout, Stack

__all__ = [
    "Bytes",
    "Content",
    "Packed",
    "PackedAnswers",
    "PackedKept",
    "Received",
    "copied",
    "pack",
    "pack_answers",
    "pack_kept",
    "unpack",
    "unpack_answers",
    "unpack_kept",
]

Content = RecordDict | Asked | Trained
"""A message's, or the same without one."""


class _PackedFlat(NamedTuple):
    layout: Layout
    places: tuple[int, ...]


class _PackedAsked(NamedTuple):
    told: dict[str, Any]
    data: DataSummary
    sent: _PackedFlat
    control: _PackedFlat | None


class _PackedTrained(NamedTuple):
    metrics: dict[str, int | float]
    tensors: dict[str, Tensor]


class _PackedRecords(NamedTuple):
    records: list[tuple[str, str, Any]]


Packed = _PackedRecords | _PackedAsked | _PackedTrained


class PackedAnswers(NamedTuple):
    """What the clients of a group answered; None where one has no answer.

    Updates in the layout that was asked for are metrics here, and their tensors the rows of a
    stack, of each kind of which `places` has the beginning.
    """

    answers: list[Packed | dict[str, int | float] | None]
    places: list[int]


class PackedKept(NamedTuple):
    """A client's state; versions are None which the other process has."""

    records: _PackedRecords
    versions: dict[tuple[str, int], _PackedFlat | None]


class Bytes:
    """Collects bytes, each object's once, and says where in the whole they begin.

    Whatever is read as a tensor begins at a multiple of 64.
    """

    def __init__(self) -> None:
        self.pieces: list[bytes | memoryview] = []
        self.size = 0
        self._places: dict[int, tuple[int, object]] = {}

    def place(self, data: bytes) -> int:
        """Add `data` unless this very object is in already; return its offset."""
        return self._place(data, [data])

    def place_tensor(self, tensor: Tensor) -> int:
        """Add the numbers of `tensor` (n,) unless this very object is in; return their offset."""
        return self._place(tensor, [_numbers(tensor)])

    def place_rows(self, rows: Sequence[Tensor]) -> int:
        """Add the numbers of `rows` (n,), one after another, and return the first's offset."""
        return self._place(rows, map(_numbers, rows))

    def _place(self, what: object, pieces: Iterable[bytes | memoryview]) -> int:
        if id(what) not in self._places:
            begin = aligned(self.size)
            self.pieces.append(bytes(begin - self.size))
            self.size = begin
            for piece in pieces:
                self.pieces.append(piece)
                self.size += len(piece)
            # Held, so that no other object can take its id.
            self._places[id(what)] = begin, what
        return self._places[id(what)][0]


class Received:
    """What was collected in another process: `memory` from `begin` on.

    `lasting`: it is there when this is gone, until the other process is asked for something again.
    """

    def __init__(self, memory: Any, begin: int, *, lasting: bool = False) -> None:
        self.lasting = lasting
        self._memory = memory
        self._begin = begin
        self._known: dict[tuple[int, int], bytes] = {}
        self._shared: dict[tuple[tuple[int, ...], torch.device | None], Flat] = {}

    def bytes(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on; read twice they are the same object."""
        place = (offset, length)
        if place not in self._known:
            begin = self._begin + offset
            self._known[place] = bytes(self._memory[begin : begin + length])
        return self._known[place]

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the numbers from `offset` on: a view of the memory, not to be written to."""
        empty = torch.empty(shape, dtype=dtype)
        if not empty.numel():
            return empty
        begin = self._begin + offset
        flat = torch.frombuffer(self._memory, dtype=dtype, count=empty.numel(), offset=begin)
        return flat.view(shape)

    def flat(self, packed: _PackedFlat) -> Flat:
        """Return a copy of what was packed."""
        return Flat(packed.layout, [part.clone() for part in self._parts(packed)])

    def shared(self, packed: _PackedFlat, device: torch.device | None) -> Flat:
        """Return what was packed on `device` (None: the CPU), put there once for all who ask."""
        key = packed.places, device
        if key not in self._shared:
            parts = self._parts(packed)
            self._shared[key] = Flat(packed.layout, [part.to(device or "cpu") for part in parts])
        return self._shared[key]

    def _parts(self, packed: _PackedFlat) -> list[Tensor]:
        kinds = zip(packed.places, packed.layout.kinds, strict=True)
        return [self.tensor(place, (size,), dtype) for place, (dtype, size) in kinds]


def aligned(size: int) -> int:
    """Return the first multiple of 64 that is not below `size`."""
    return -(-size // 64) * 64


def pack(content: Content, data: Bytes) -> Packed:
    """Return `content` as plain values; the bytes of its arrays go into `data`."""
    if isinstance(content, Asked):
        control = None if content.control is None else _flat(content.control, data)
        return _PackedAsked(content.told, content.data, _flat(content.sent, data), control)
    if isinstance(content, Trained):
        tensors = content.tensors
        named = tensors.tensors() if isinstance(tensors, Flat) else dict(tensors)
        return _PackedTrained(content.metrics, named)
    return _records(content, data)


def unpack(packed: Packed, received: Received, device: torch.device | None = None) -> Content:
    """Return what `pack` was given.

    What clients are asked without a message is put on their `device` if one is given, once for all
    that are asked the same.
    """
    if isinstance(packed, _PackedAsked):
        sent = received.shared(packed.sent, device)
        control = None if packed.control is None else received.shared(packed.control, device)
        return Asked(dict(packed.told), packed.data, sent, control)
    if isinstance(packed, _PackedTrained):
        return Trained(packed.metrics, packed.tensors)
    content = RecordDict()
    _unpack_into(content, packed, received)
    return content


def pack_answers(
    contents: Sequence[Content | None], layout: Layout | None, data: Bytes
) -> PackedAnswers:
    """Return what a group answered, asked for updates in this `layout`, or by messages (None).

    Their tensors go into `data` as one stack, which a device is asked for by one transfer a kind.
    """
    answers: list[Packed | dict[str, int | float] | None] = []
    flats: list[Flat] = []
    for content in contents:
        tensors = content.tensors if isinstance(content, Trained) else None
        if isinstance(content, Trained) and isinstance(tensors, Flat) and tensors.layout == layout:
            flats.append(tensors)
            answers.append(content.metrics)
        else:
            answers.append(None if content is None else pack(content, data))
    if not flats:
        return PackedAnswers(answers, [])
    places = []
    for kind in range(len(flats[0].parts)):
        rows = [flat.parts[kind] for flat in flats]
        if rows[0].device.type != "cpu":
            rows = list(torch.stack(rows).cpu())
        places.append(data.place_rows(rows))
    return PackedAnswers(answers, places)


def unpack_answers(
    packed: PackedAnswers, layout: Layout | None, received: Received, device: torch.device
) -> list[Content | None]:
    """Return what `pack_answers` was given, the updates on `device`, put there as one stack.

    On the CPU they may be where they were received: until the workers are asked again.
    """
    count = sum(isinstance(answer, dict) for answer in packed.answers)
    rows: list[Flat] = []
    if count:
        assert layout is not None
        kinds = zip(packed.places, layout.kinds, strict=True)
        views = [received.tensor(place, (count, size), dtype) for place, (dtype, size) in kinds]
        # A message's own memory, and what it is known by, is given back when that was read.
        parts = [view.to(device, copy=not received.lasting) for view in views]
        stack = Stack(layout, parts, count)
        rows = [Flat(layout, [part[i] for part in stack.parts]) for i in range(count)]
    waiting = iter(rows)
    found: list[Content | None] = []
    for answer in packed.answers:
        if isinstance(answer, dict):
            found.append(Trained(answer, next(waiting)))
        else:
            found.append(None if answer is None else unpack(answer, received))
    return found


def pack_kept(
    kept: Kept, data: Bytes, known: Mapping[tuple[str, int], Flat] | None = None
) -> PackedKept | None:
    """Return a client's state; of its versions those that are not `known` to who gets it.

    None where there is nothing in it.
    """
    if not kept:
        return None
    there = known or {}
    versions = {
        key: None if there.get(key) is flat else _flat(flat, data)
        for key, flat in kept.versions.items()
    }
    return PackedKept(_records(kept, data), versions)


def unpack_kept(packed: PackedKept | None, received: Received, kept: Kept) -> Kept:
    """Return `kept` as the state that `pack_kept` was given: it has the versions known there."""
    if packed is None:
        return kept
    kept.clear()
    _unpack_into(kept, packed.records, received)
    for run, round_ in kept.versions.keys() - packed.versions.keys():
        kept.drop(run, round_)
    for key, flat in packed.versions.items():
        if flat is not None:
            kept.drop(*key)
            kept.versions[key] = received.flat(flat)
    return kept


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


def _numbers(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


def _flat(flat: Flat, data: Bytes) -> _PackedFlat:
    return _PackedFlat(flat.layout, tuple(data.place_tensor(part) for part in flat.parts))


def _records(content: RecordDict, data: Bytes) -> _PackedRecords:
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


def _unpack_into(content: RecordDict, packed: _PackedRecords, received: Received) -> None:
    for name, kind, values in packed.records:
        if kind == "arrays":
            content[name] = _arrays(
                (key, dtype, shape, stype, received.bytes(offset, length))
                for key, dtype, shape, stype, offset, length in values
            )
        else:
            content[name] = _record(kind == "metrics", values)


def _arrays(arrays: Iterable[tuple[str, str, tuple[int, ...], str, bytes]]) -> ArrayRecord:
    # One by one: given a dictionary, ArrayRecord makes every Array again.
    record = ArrayRecord()
    for key, dtype, shape, stype, data in arrays:
        record[key] = Array(dtype, shape, stype, data)
    return record


def _record(metrics: bool, values: Mapping[str, Any]) -> MetricRecord | ConfigRecord:
    own = {key: list(v) if isinstance(v, list) else v for key, v in values.items()}
    return MetricRecord(own) if metrics else ConfigRecord(own)
