"""The parts of a reply, checked before any of them is inflated.

A part is ``KIND child,child… LENGTH`` NUL body. Flower inflates parts into a message by putting
children into parents: an array lists chunks by index, any number of times, a record lists arrays by
name. So a few megabytes can name gigabytes, and nothing that Flower checks on their way bounds it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.recorddict_pb2 import ConfigRecord as ConfigProto
from flwr.proto.recorddict_pb2 import MetricRecord as MetricProto

from fedkn.federation import PACKED

__all__ = ["check_objects", "most_parts"]

# Bytes of what is not array data: bodies are parsed into objects some twenty times as large.
_LARGEST_BODY = {
    "Message": 1 << 18,
    "RecordDict": 1 << 13,
    "ArrayRecord": 1 << 20,
    "Array": 1 << 18,
    "MetricRecord": 1 << 16,
    "ConfigRecord": 1 << 16,
}
_ALL_BODIES = 1 << 20
_CHUNK = "ArrayChunk"
_RECORDS = ("ArrayRecord", "MetricRecord", "ConfigRecord")
_MOST_RECORDS = 8
# NumPy itself reads no longer header of an .npy file.
_LONGEST_HEADER = 10_000 + 128
_MOST_DIMENSIONS = 32


def most_parts(largest: int) -> int:
    """Return how many parts a reply of at most `largest` bytes may have.

    An array of a model is two, itself and its data; long data is cut, on devices at 256 KiB.
    """
    return 8192 + largest // (1 << 16)


def check_objects(root: str, parts: Mapping[str, bytes], largest: int) -> None:
    """Check that the message `root`, inflated from `parts`, is a reply of at most `largest` bytes.

    Its parts must be of the kinds that may stand in each other, listed once, with bodies of bounded
    size in which no key comes twice; an array's dtype and shape must fit its bytes; and arrays
    together, each as often as it is named, must not exceed `largest`.

    Raises:
        ValueError: naming what does not fit. JSON and protobuf that cannot be read raise what their
            parsers do. Nothing is ever allocated in the measure of what a part claims.
    """
    _Graph(parts, largest).message(root)


class _Part(NamedTuple):
    kind: str
    children: list[str]
    body: memoryview


class _Graph:
    """Walks down from a message. Kinds only ever contain lower ones, so there are no circles."""

    def __init__(self, parts: Mapping[str, bytes], largest: int) -> None:
        self._parts = parts
        self._largest = largest
        self._bodies = 0
        self._data = 0
        self._sizes: dict[str, int] = {}

    def message(self, name: str) -> None:
        part = self._part(name, "Message")
        said = MessageProto.FromString(bytes(part.body))
        if len(part.children) != (0 if said.HasField("error") else 1):
            raise ValueError(f"a message of {len(part.children)} contents")
        for child in part.children:
            self._contents(child)

    def _contents(self, name: str) -> None:
        part = self._part(name, "RecordDict")
        records = _references(part)
        if len(records) > _MOST_RECORDS:
            raise ValueError(f"{len(records)} records: {_MOST_RECORDS} at most")
        for record in records.values():
            self._record(record)

    def _record(self, name: str) -> None:
        part = self._part(name, *_RECORDS)
        if part.kind == "ArrayRecord":
            for array in _references(part).values():
                self._data += self._array(array)
                if self._data > self._largest:
                    raise ValueError(f"arrays of more than {self._largest} bytes")
            return
        if part.children:
            raise ValueError(f"a {part.kind} that holds other parts")
        body = bytes(part.body)
        if part.kind == "MetricRecord":
            keys = [item.key for item in MetricProto.FromString(body).items]
        else:
            keys = [item.key for item in ConfigProto.FromString(body).items]
        if len(set(keys)) < len(keys):
            raise ValueError(f"a {part.kind} with a key that comes twice")

    def _array(self, name: str) -> int:
        """Return the bytes that an array's data has."""
        if name in self._sizes:
            return self._sizes[name]
        part = self._part(name, "Array")
        said = _json(part)
        if said.keys() != {"dtype", "shape", "stype", "arraychunk_ids"}:
            raise ValueError("an array that is described by other keys")
        chunks = [self._chunk(child) for child in part.children]
        indices = _numbers(said["arraychunk_ids"], len(chunks) - 1)
        if len(set(indices)) < len(chunks):
            raise ValueError("an array that does not use its chunks")
        size = sum(chunks[index] for index in indices)
        if size > self._largest:
            raise ValueError(
                f"an array of {size} bytes, of which one chunk is named again and again"
            )
        _check_claims(said, size)
        self._sizes[name] = size
        return size

    def _chunk(self, name: str) -> int:
        part = self._part(name, _CHUNK)
        if part.children:
            raise ValueError("a chunk that holds other parts")
        return len(part.body)

    def _part(self, name: str, *kinds: str) -> _Part:
        content = self._parts.get(name)
        if content is None:
            raise ValueError("a part that is not there")
        end = content.find(b"\0", 0, _ALL_BODIES)
        head = content[: max(end, 0)].decode("utf-8").split(" ")
        if end < 0 or len(head) != 3:
            raise ValueError("a part without a head")
        kind, listed, _ = head
        if kind not in kinds:
            raise ValueError(f"a part of another kind than {' or '.join(kinds)}")
        children = listed.split(",") if listed else []
        if len(set(children)) < len(children):
            raise ValueError(f"a {kind} that lists a part twice")
        body = memoryview(content)[end + 1 :]
        if kind != _CHUNK:
            self._bodies += end + len(body)
            if len(body) > _LARGEST_BODY[kind] or self._bodies > _ALL_BODIES:
                raise ValueError(f"a {kind} of {len(body)} bytes is too large")
        return _Part(kind, children, body)


def _references(part: _Part) -> dict[str, str]:
    """Return by name the parts that a record holds: all that it lists, and no others."""
    named = _json(part)
    if not all(isinstance(child, str) for child in named.values()):
        raise ValueError(f"a {part.kind} whose names stand for no parts")
    if set(named.values()) != set(part.children):
        raise ValueError(f"a {part.kind} that names other parts than it lists")
    return named


def _check_claims(said: Mapping[str, Any], size: int) -> None:
    """Check that dtype and shape of an array are those of data of `size` bytes."""
    dtype, stype = said["dtype"], said["stype"]
    if not all(isinstance(text, str) and len(text) <= 64 for text in (dtype, stype)):
        raise ValueError("an array whose dtype and serialization are no names")
    shape = _numbers(said["shape"], 1 << 40)
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"an array of {len(shape)} dimensions")
    try:
        claimed = math.prod(shape) * np.dtype(dtype).itemsize
    except (TypeError, ValueError, SyntaxError):
        raise ValueError("an array of no dtype that there is") from None
    header = 0 if stype == PACKED else _LONGEST_HEADER
    if not claimed <= size <= claimed + header:
        raise ValueError(f"an array whose dtype and shape are of {claimed} bytes, not of {size}")


def _numbers(value: Any, most: int) -> Sequence[int]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n <= most for n in value):
        raise ValueError("an array whose sizes or chunks are no possible numbers")
    return value


def _json(part: _Part) -> dict[str, Any]:
    value = json.loads(bytes(part.body), object_pairs_hook=_once, parse_int=_short)
    if not isinstance(value, dict):
        raise ValueError(f"a {part.kind} that is no table")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a table with a key that comes twice")
    return table


def _short(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("a number of too many digits")
    return int(digits)
