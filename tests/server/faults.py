"""What a broken or malicious client may send: each fault spoils one honest update."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.lib import format as npy

__all__ = ["FAULTS", "spoiled"]

Arrays = dict[str, Array]
Metrics = dict[str, Any]


def spoiled(fault: str, honest: Message, message: Message) -> Message:
    """Return the answer to `message` with the `honest` update spoiled by `fault`."""
    content = honest.content
    arrays = dict(content.array_records["arrays"].items())
    metrics: Metrics = dict(content.metric_records["metrics"].items())
    result = FAULTS[fault][0](arrays, metrics)
    if result is None:
        result = RecordDict({"arrays": ArrayRecord(arrays), "metrics": _record(metrics)})
    return Message(result, reply_to=message)


def _record(metrics: Metrics) -> MetricRecord:
    return MetricRecord(metrics)


def _first(arrays: Arrays) -> str:
    return max(arrays, key=lambda name: arrays[name].numpy().ndim)


def _element(value: float) -> Callable[[Arrays, Metrics], None]:
    def fault(arrays: Arrays, metrics: Metrics) -> None:
        name = _first(arrays)
        spoiled = arrays[name].numpy().copy()
        spoiled.flat[-1] = value
        arrays[name] = Array(spoiled)

    return fault


def _all(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays, Metrics], None]:
    def fault(arrays: Arrays, metrics: Metrics) -> None:
        for name, array in arrays.items():
            arrays[name] = Array(change(array.numpy()))

    return fault


def _one(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays, Metrics], None]:
    def fault(arrays: Arrays, metrics: Metrics) -> None:
        name = _first(arrays)
        arrays[name] = Array(change(arrays[name].numpy()))

    return fault


def _raw(change: Callable[[Array], tuple[str, tuple[int, ...], str, bytes]]) -> Any:
    def fault(arrays: Arrays, metrics: Metrics) -> None:
        name = _first(arrays)
        arrays[name] = Array(*change(arrays[name]))

    return fault


def _metric(key: str, value: Any) -> Callable[[Arrays, Metrics], None]:
    def fault(arrays: Arrays, metrics: Metrics) -> None:
        metrics[key] = value

    return fault


def _without(arrays: Arrays, metrics: Metrics) -> None:
    del arrays[_first(arrays)]


def _extra(arrays: Arrays, metrics: Metrics) -> None:
    arrays["backdoor"] = Array(np.zeros(3, np.float32))


def _missing_metric(arrays: Arrays, metrics: Metrics) -> None:
    del metrics["steps"]


def _many(arrays: Arrays, metrics: Metrics) -> None:
    metrics.update({f"{'k' * 60}{number}": 1 for number in range(100_000)})


def _config(arrays: Arrays, metrics: Metrics) -> RecordDict:
    records = {"arrays": ArrayRecord(arrays), "metrics": _record(metrics)}
    return RecordDict({**records, "config": ConfigRecord({"clip": 1})})


def _swapped(arrays: Arrays, metrics: Metrics) -> None:
    vectors = [name for name in arrays if arrays[name].numpy().ndim == 1]
    a, b = vectors[0], next(n for n in vectors if arrays[n].shape != arrays[vectors[0]].shape)
    arrays[a], arrays[b] = arrays[b], arrays[a]


def _two_records(arrays: Arrays, metrics: Metrics) -> RecordDict:
    record = ArrayRecord(arrays)
    return RecordDict({"arrays": record, "more": record, "metrics": _record(metrics)})


def _no_arrays(arrays: Arrays, metrics: Metrics) -> RecordDict:
    return RecordDict({"metrics": _record(metrics)})


def _two_metrics(arrays: Arrays, metrics: Metrics) -> RecordDict:
    records = {"arrays": ArrayRecord(arrays), "metrics": _record(metrics)}
    return RecordDict({**records, "again": _record(metrics)})


def _header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    stream = BytesIO()
    npy.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _npy_text(text: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _pickled(array: Array) -> tuple[str, tuple[int, ...], str, bytes]:
    stream = BytesIO()
    np.save(stream, np.array([{"harmless": 1}], dtype=object), allow_pickle=True)
    return array.dtype, array.shape, array.stype, stream.getvalue()


_HUGE = (10**11,)

# name: (what it does to the update, what the reason must say)
FAULTS: dict[str, tuple[Callable[[Arrays, Metrics], RecordDict | None], str]] = {
    "nan": (_element(math.nan), "not finite"),
    "infinity": (_element(math.inf), "not finite"),
    "wrong shape": (_one(np.ravel), "has shape"),
    "transposed": (_one(lambda a: a.T.copy()), "has shape"),
    "broadcastable shape": (_one(lambda a: np.ones(1, a.dtype)), "has shape"),
    "scalar": (_one(lambda a: np.ones((), a.dtype)), "has shape"),
    "empty": (_one(lambda a: a[:0]), "has shape"),
    "swapped tensors": (_swapped, "has shape"),
    "missing key": (_without, "missing or not expected"),
    "extra key": (_extra, "missing or not expected: backdoor"),
    "string dtype": (_one(lambda a: a.astype("<U8")), "has dtype"),
    "integer dtype": (_one(lambda a: a.astype(np.int64)), "has dtype"),
    "double dtype": (_one(lambda a: a.astype(np.float64)), "has dtype"),
    "complex dtype": (_one(lambda a: a.astype(np.complex64)), "has dtype"),
    "foreign byte order": (_one(lambda a: a.astype(">f4")), "has dtype"),
    "object dtype": (_raw(_pickled), "has (shape|dtype)"),
    "pickle": (
        _raw(lambda a: (a.dtype, a.shape, a.stype, pickle.dumps(a.numpy()))),
        "is no array",
    ),
    "other serialization": (_raw(lambda a: (a.dtype, a.shape, "pickle", a.data)), "serialized as"),
    "header claims 1e11": (_raw(lambda a: (a.dtype, a.shape, a.stype, _header(_HUGE))), "shape"),
    "all claim 1e11": (_raw(lambda a: (a.dtype, _HUGE, a.stype, _header(_HUGE))), "has shape"),
    "declared shape differs": (_raw(lambda a: (a.dtype, (1,), a.stype, a.data)), "declared"),
    "declared dtype differs": (_raw(lambda a: ("float64", a.shape, a.stype, a.data)), "dtype"),
    "truncated": (_raw(lambda a: (a.dtype, a.shape, a.stype, a.data[:-4])), "carries"),
    "too long": (_raw(lambda a: (a.dtype, a.shape, a.stype, a.data + b"\0" * 4)), "carries"),
    "no bytes": (_raw(lambda a: (a.dtype, a.shape, a.stype, b"")), "is no array"),
    "garbage": (_raw(lambda a: (a.dtype, a.shape, a.stype, b"\xff" * 99)), "is no array"),
    "newer format": (
        _raw(lambda a: (a.dtype, a.shape, a.stype, b"\x93NUMPY\x03\x00" + a.data[8:])),
        "version",
    ),
    "header is no literal": (
        _raw(lambda a: (a.dtype, a.shape, a.stype, _npy_text(b"{'descr': (((((\n"))),
        "is no array|unreadable",
    ),
    "deeply nested header": (
        _raw(lambda a: (a.dtype, a.shape, a.stype, _npy_text(b"(" * 9000 + b"\n"))),
        "is no array|unreadable",
    ),
    "no weight": (_metric("num-examples", 0), "examples, but declared"),
    "negative weight": (_metric("num-examples", -5), "examples, but declared"),
    "nan weight": (_metric("num-examples", math.nan), "not a finite number"),
    "infinite weight": (_metric("num-examples", math.inf), "not a finite number"),
    "huge weight": (_metric("num-examples", 10**12), "examples, but declared"),
    "gigantic integer": (_metric("num-examples", 10**400), "examples, but"),
    "weight in a list": (_metric("num-examples", [1, 2]), "not a finite number"),
    "nothing trained": (_metric("trained-examples", 0), "trained on no example"),
    "negative count": (_metric("steps", -1), "'steps' is -1: 1 to"),
    "huge training": (_metric("trained-examples", 10**9), r"'trained-examples' is 1e\+09: 1 to"),
    "no step": (_metric("steps", 0), "'steps' is 0: 1 to"),
    "half a step": (_metric("steps", 2.5), "'steps' is 2.5, not a whole number"),
    "huge steps": (_metric("steps", 10**9), r"'steps' is 1e\+09: 1 to"),
    "nan loss": (_metric("train-loss", math.nan), "not a finite number"),
    "a count that overflows": (_metric("trained-examples", 1.7e308), "not a whole number"),
    "a huge epsilon": (_metric("epsilon", 1e300), r"'epsilon' is 1e\+300: 0 is possible"),
    "a huge loss": (_metric("train-loss", 1e300), r"'train-loss' is 1e\+300: 0 to"),
    "centuries of training": (_metric("train-seconds", 1e12), r"'train-seconds' is 1e\+12: 0 to"),
    "a huge batch": (_metric("batch-size", 10**6), r"'batch-size' is 1e\+06: 0 to"),
    "a flag that is none": (_metric("state-lost", 2), "'state-lost' is 2: 0 to 1"),
    "a name that forges a line": (
        _metric("x\nINFO : all is well", 1),
        r"metrics missing or not expected: x INFO : all is well$",
    ),
    "a hundred thousand names": (_many, r", … \(100000 in all\)$"),
    "missing metric": (_missing_metric, "metrics missing or not expected: steps"),
    "extra metric": (_metric("node-id", 7), "metrics missing or not expected: node-id"),
    "nobody's partition": (_metric("partition-id", 77), "was not asked to train"),
    "half a partition": (_metric("partition-id", 0.5), "was not asked to train"),
    "two array records": (_two_records, "expected one record 'arrays'"),
    "no array record": (_no_arrays, "expected one record 'arrays'"),
    "two metric records": (_two_metrics, "expected one record 'metrics'"),
    "a config record": (_config, "records not expected: config"),
    "nothing at all": (lambda arrays, metrics: RecordDict(), "expected one record"),
    "a million times too far": (
        _all(lambda a: np.asarray(a * 1e6, dtype=a.dtype)),
        "moves the weights by",
    ),
    "almost infinite": (_element(3e38), "moves the weights by"),
}
