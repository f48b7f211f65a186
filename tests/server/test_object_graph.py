"""Replies whose parts claim what they do not hold, built part by part as a hostile device would."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.error_pb2 import Error as ErrorProto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.recorddict_pb2 import MetricRecord as MetricProto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    validate_object_content,
)

from fedkn.federation import arrays_record, packed
from server.object_graph import check_objects, most_parts
from tests.server.fake_grid import ScriptedGrid

LARGEST = 1 << 20


class Parts(dict[str, bytes]):
    """The parts of a reply by id; Flower's own validation of pushed parts accepts each."""

    def add(self, kind: str, body: bytes, children: list[str] | tuple[str, ...] = ()) -> str:
        content = f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body
        validate_object_content(content)
        name = hashlib.sha256(content).hexdigest()
        self[name] = content
        return name

    def array(self, chunks: list[str], indices: list[int], **claims: object) -> str:
        said = {"dtype": "float32", "shape": [1], "stype": "numpy.ndarray"} | claims
        return self.add("Array", json.dumps({**said, "arraychunk_ids": indices}).encode(), chunks)

    def table(self, kind: str, **entries: str) -> str:
        children = list(dict.fromkeys(entries.values()))
        return self.add(kind, json.dumps(entries).encode(), children)

    def message(self, *children: str, error: str | None = None) -> str:
        said = MessageProto(error=ErrorProto(code=1, reason=error) if error is not None else None)
        return self.add("Message", said.SerializeToString(), children)

    def reply(self, **records: str) -> str:
        return self.message(self.table("RecordDict", **records))


def honest(content: RecordDict | Error) -> tuple[str, Parts]:
    ScriptedGrid([], lambda message: [])
    question = Message(RecordDict(), dst_node_id=7, message_type="train")
    question.metadata.__dict__["_message_id"] = "asked"
    reply = Message(content, reply_to=question)
    return reply.object_id, Parts(
        {key: one.deflate() for key, one in get_all_nested_objects(reply).items()}
    )


ARRAYS = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "same": np.arange(12, dtype=np.float32).reshape(3, 4),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 4), np.float32),
    "zeros": np.zeros(60_000, np.float32),
}


@pytest.mark.parametrize("chunk_bytes", [None, 256, 4096])
@pytest.mark.parametrize("pack", [False, True])
def test_honest_replies_pass(chunk_bytes, pack, monkeypatch):
    if chunk_bytes:
        # Chunks of zeros are equal: one part, named many times.
        monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", chunk_bytes)
    arrays = arrays_record(ARRAYS)
    content = RecordDict(
        {
            "arrays": packed(arrays) if pack else arrays,
            "metrics": MetricRecord({"n": 3, "list": [1.0, 2.0]}),
            "config": ConfigRecord({"text": "x"}),
        }
    )
    root, parts = honest(content)
    size = sum(map(len, parts.values()))
    check_objects(root, parts, LARGEST)
    assert len(parts) <= most_parts(size)
    inflate_object_from_contents(root, parts)


def test_an_honest_error_passes():
    root, parts = honest(Error(1, "Traceback …\n" + "  line\n" * 10_000))
    check_objects(root, parts, LARGEST)


def _bomb(parts: Parts) -> str:
    chunk = parts.add("ArrayChunk", b"\0" * (1 << 19))
    return parts.reply(arrays=parts.table("ArrayRecord", w=parts.array([chunk], [0] * 1000)))


def _bomb_by_name(parts: Parts) -> str:
    chunk = parts.add("ArrayChunk", b"\0" * (1 << 19))
    array = parts.array([chunk], [0], shape=[(1 << 17) - 32])
    return parts.reply(
        arrays=parts.table("ArrayRecord", **{f"w{number}": array for number in range(100)})
    )


def _bomb_by_record(parts: Parts) -> str:
    chunk = parts.add("ArrayChunk", b"\0" * (1 << 19))
    record = parts.table("ArrayRecord", w=parts.array([chunk], [0], shape=[(1 << 17) - 32]))
    return parts.reply(**{f"r{number}": record for number in range(8)})


def _array(indices: list[int], size: int = 200, **claims: object) -> Callable[[Parts], str]:
    def build(parts: Parts) -> str:
        chunk = parts.add("ArrayChunk", b"\0" * size)
        return parts.reply(
            arrays=parts.table("ArrayRecord", w=parts.array([chunk], indices, **claims))
        )

    return build


def _array_body(body: bytes) -> Callable[[Parts], str]:
    def build(parts: Parts) -> str:
        return parts.reply(arrays=parts.table("ArrayRecord", w=parts.add("Array", body)))

    return build


def _metrics(body: bytes) -> Callable[[Parts], str]:
    return lambda parts: parts.reply(metrics=parts.add("MetricRecord", body))


def _twice() -> bytes:
    item = MetricProto.Item(key="n")
    item.value.sint64 = 3
    return MetricProto(items=[item, item]).SerializeToString()


def _nested(parts: Parts) -> str:
    inner = parts.table("RecordDict", metrics=parts.add("MetricRecord", b""))
    return parts.reply(arrays=inner)


def _self(parts: Parts) -> str:
    # No hash contains itself; the SuperLink's store is not what vouches for that here.
    parts["loop"] = b"RecordDict loop 14\0" + b'{"a": "loop"}'
    return _message_of(parts, "loop")


def _message_of(parts: Parts, child: str) -> str:
    parts["root"] = f"Message {child} 0".encode() + b"\0"
    return "root"


def _large_table(parts: Parts) -> str:
    body = json.dumps({f"{'k' * 60}{number}": "x" * 64 for number in range(20_000)}).encode()
    return parts.reply(arrays=parts.add("ArrayRecord", body))


def _many_arrays(parts: Parts) -> str:
    chunk = parts.add("ArrayChunk", b"")
    arrays = [
        parts.array([chunk], [0] * 50_000, shape=[0], dtype=f"S{number}") for number in range(30)
    ]
    return parts.reply(
        arrays=parts.table("ArrayRecord", **{f"a{n}": one for n, one in enumerate(arrays)})
    )


BAD: dict[str, tuple[Callable[[Parts], str], str]] = {
    "a chunk named a thousand times": (_bomb, "named again and again"),
    "an array named a hundred times": (_bomb_by_name, "arrays of more than"),
    "a record named eight times": (_bomb_by_record, "arrays of more than"),
    "nine records": (
        lambda parts: parts.reply(**{f"m{n}": parts.add("MetricRecord", b"") for n in range(9)}),
        "9 records",
    ),
    "a negative index": (_array([-1]), "no possible numbers"),
    "an index beyond": (_array([0, 1]), "no possible numbers"),
    "an index that is true": (_array([True]), "no possible numbers"),
    "an index that is a fraction": (_array([0.0]), "no possible numbers"),
    "no index": (_array([]), "does not use its chunks"),
    "indices in a table": (_array({"0": 0}), "no possible numbers"),
    "a shape of 10^15": (_array([0], shape=[10**15]), "no possible numbers|are of"),
    "a shape whose product is large": (_array([0], shape=[10**6] * 30), "are of"),
    "a shape of too many dimensions": (_array([0], shape=[1] * 33), "33 dimensions"),
    "a negative shape": (_array([0], shape=[-1]), "no possible numbers"),
    "a shape of an int of 5000 digits": (
        _array_body(
            b'{"dtype": "float32", "shape": [' + b"9" * 5000 + b'], "stype": "x", '
            b'"arraychunk_ids": []}'
        ),
        "too many digits",
    ),
    "a shape smaller than the data": (_array([0], size=20_000), "are of 4 bytes"),
    "a dtype that is none": (_array([0], dtype="float99"), "no dtype"),
    "a dtype of 10^9 bytes": (_array([0], dtype="V1000000000"), "are of"),
    "a dtype that is a list": (_array([0], dtype=[["a", "f4"]]), "no names"),
    "a dtype of a megabyte": (_array([0], dtype="f" * 1_000), "no names"),
    "an array without a dtype": (_array_body(b'{"shape": []}'), "other keys"),
    "an array that is a list": (_array_body(b"[]"), "no table"),
    "an array that is no JSON": (_array_body(b"{"), ""),
    "an array nested deeply": (_array_body(b"[" * 100_000), ""),
    "an array with a key twice": (_array_body(b'{"dtype": "a", "dtype": "b"}'), "comes twice"),
    "metrics that are no protobuf": (_metrics(b"\xff" * 100), ""),
    "metrics with a key twice": (_metrics(_twice()), "key that comes twice"),
    "metrics of a megabyte": (_metrics(b"\n\0" * (1 << 18)), "too large"),
    "records in records": (_nested, "another kind"),
    "a circle": (_self, "another kind"),
    "a part that is missing": (lambda parts: _message_of(parts, "f" * 64), "not there"),
    "a part without a head": (
        lambda parts: parts.update(x=b"RecordDict") or _message_of(parts, "x"),
        "without a head",
    ),
    "a head that is no text": (
        lambda parts: parts.update(x=b"\xff\xfe 0\0") or _message_of(parts, "x"),
        "",
    ),
    "a table of a megabyte": (_large_table, "too large"),
    "tables of a megabyte together": (_many_arrays, "too large"),
    "a message without content": (lambda parts: parts.message(), "0 contents"),
    "a message of two contents": (
        lambda parts: parts.message(
            parts.table("RecordDict"),
            parts.table("RecordDict", m=parts.add("MetricRecord", b"")),
        ),
        "2 contents",
    ),
    "an error with content": (
        lambda parts: parts.message(parts.table("RecordDict"), error="x"),
        "1 contents",
    ),
    "an error of a megabyte": (lambda parts: parts.message(error="x" * 1_000_000), "too large"),
    "a record as a message": (lambda parts: parts.table("RecordDict"), "another kind"),
    "a record of names that are none": (
        lambda parts: parts.reply(arrays=parts.add("ArrayRecord", b'{"w": 3}')),
        "stand for no parts",
    ),
    "a record that names what it does not list": (
        lambda parts: parts.reply(arrays=parts.add("ArrayRecord", b'{"w": "abc"}')),
        "names other parts",
    ),
    "a part listed twice": (
        lambda parts: parts.message(
            parts.add("RecordDict", b"{}", [parts.add("MetricRecord", b"")] * 2)
        ),
        "lists a part twice",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_reply_is_refused_before_it_takes_memory(case):
    build, reason = BAD[case]
    parts = Parts()
    root = build(parts)
    tracemalloc.start()
    try:
        with pytest.raises(Exception, match=reason or None) as caught:
            check_objects(root, parts, LARGEST)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Parsers raise what they like; what we refuse ourselves is a ValueError with its reason.
    assert not reason or isinstance(caught.value, ValueError)
    assert peak < 24 * LARGEST
