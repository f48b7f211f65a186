"""What crosses the wire: tensors as Flower ArrayRecords, metrics, and the keys of both.

The only module of this package that imports Flower.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedkn.data.summary import DataSummary
from fedkn.errors import UserError
from fedkn.normalizers import TensorRole
from fedkn.npy_headers import npy_header
from fedkn.text import printable
from fedkn.training import LocalUpdate
from fedkn.training.transfer import moved

__all__ = [
    "ARRAYS",
    "CONFIG",
    "CONTROL",
    "DATA",
    "EVALUATION_LOSS",
    "EVALUATION_METRICS",
    "EXAMPLES",
    "FIXED",
    "LABELS",
    "LEARNING_RATE",
    "METRICS",
    "PACKED",
    "PARTITION",
    "ROUND",
    "RUN_TOKEN",
    "STATE_ROUND",
    "TRAIN_LOSS",
    "TRAIN_METRICS",
    "VALUE",
    "arrays_record",
    "arrays_to_tensors",
    "data_record",
    "evaluation_metrics",
    "failure_reason",
    "fixed_sha256",
    "is_packed",
    "join_answer",
    "join_request",
    "on_the_wire",
    "packed",
    "packed_sizes",
    "record_bytes",
    "tensors_to_arrays",
    "told_data",
    "unpacked",
    "update_metrics",
]

# Records of a message. These are Flower's own defaults, so its strategies find them.
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"

# Name and kind of the one array of a packed record.
PACKED = "fedkn.packed"

# Record of what a strategy sends the clients beside the arrays: tensors for its client half.
CONTROL = "control"

# Record of every message to a client: what it must know of the experiment's images.
DATA = "data"

# Config of a training message; the round carries Flower's name. A strategy adds what its client
# half is to be told.
ROUND, LEARNING_RATE = "server-round", "learning-rate"

# Which run a client's own tensors belong to, and the round that left them as the server last
# accepted an update of that client (0: never).
RUN_TOKEN, STATE_ROUND = "run-token", "state-round"

# What `fixed_sha256` gives of the server's tensors that nobody changes, where there are any.
FIXED = "fixed-sha256"

# Metrics of an update: which partition, its number of examples (the weight in the average), and
# what the local training did.
PARTITION, EXAMPLES, TRAIN_LOSS = "partition-id", "num-examples", "train-loss"
TRAIN_METRICS = (
    PARTITION,
    EXAMPLES,
    "trained-examples",
    "steps",
    "skipped-batches",
    "skipped-examples",
    TRAIN_LOSS,
    "train-seconds",
    "state-lost",
    "epsilon",
    "batch-size",
    "data-changed",
)

# Metric of a client's answer on joining, beside its partition and examples: images of each class.
LABELS = "labels"

# Metrics of a client that evaluated its own model: the deciding metric's value, and the mean loss.
VALUE, EVALUATION_LOSS = "value", "loss"
EVALUATION_METRICS = (PARTITION, EXAMPLES, VALUE, EVALUATION_LOSS)

# Roles whose tensors travel in both directions.
_TRAVELS = frozenset({TensorRole.SHARED, TensorRole.MEAN, TensorRole.VARIANCE, TensorRole.FROZEN})


def on_the_wire(rule: Mapping[str, TensorRole]) -> tuple[str, ...]:
    """Return the names of the tensors that are sent, in the order of the model's state."""
    return tuple(name for name, role in rule.items() if role in _TRAVELS)


def fixed_sha256(rule: Mapping[str, TensorRole], state: Mapping[str, Tensor]) -> str:
    """Return a hash of the tensors that stay as they were built; empty where there are none.

    They do not travel, so this is how client and server see that they have the same.
    """
    names = [name for name, role in rule.items() if role is TensorRole.FIXED]
    digest = hashlib.sha256()
    for name, value in moved({name: state[name] for name in names}, torch.device("cpu")).items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if names else ""


def arrays_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Return NumPy `arrays` as an ArrayRecord of the same names (a copy).

    Raises:
        ValueError: for an array of Python objects, which would have to be pickled.
    """
    # One by one: given a dictionary, ArrayRecord makes every Array again.
    record = ArrayRecord()
    for name, value in arrays.items():
        record[name] = _array(value)
    return record


def tensors_to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return `tensors` as an ArrayRecord of the same names, shapes and dtypes (a copy).

    Raises:
        UserError: naming a tensor of a dtype that NumPy lacks, such as bfloat16.
    """
    arrays = {}
    for name, value in moved(tensors, torch.device("cpu")).items():
        try:
            arrays[name] = value.numpy()
        except TypeError:
            raise UserError(
                f"'{name}' is {value.dtype}, which cannot be sent: keep the model in float32"
            ) from None
    return arrays_record(arrays)


def arrays_to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Return an ArrayRecord, packed or not, as tensors on the CPU (a copy).

    Raises:
        ValueError: naming an array that is no NumPy array of numbers; pickles are not opened.
    """
    tensors = {}
    for name, array in unpacked(record).items():
        try:
            tensors[name] = torch.from_numpy(_value(array))
        except (TypeError, ValueError, EOFError) as error:
            raise ValueError(f"'{name}' is no array of numbers: {error}") from None
    return tensors


def packed(record: ArrayRecord) -> ArrayRecord:
    """Return `record` as a record of a single array, from which `unpacked` makes it again.

    Between deployed nodes every array travels by requests of its own, each of which costs the
    SuperLink some ten milliseconds, however small the array is.
    """
    index = [[n, a.dtype, list(a.shape), a.stype, len(a.data)] for n, a in record.items()]
    text = json.dumps(index).encode()
    data = b"".join([len(text).to_bytes(8, "little"), text, *(a.data for a in record.values())])
    whole = ArrayRecord()
    whole[PACKED] = Array("uint8", (len(data),), PACKED, data)
    return whole


def is_packed(record: ArrayRecord) -> bool:
    """Return whether `record` is one of `packed`."""
    return list(record) == [PACKED] and record[PACKED].stype == PACKED


def unpacked(record: ArrayRecord) -> ArrayRecord:
    """Return what was `packed`; a record that is not packed is returned as it is.

    The arrays are as they were sent, and nothing of them was read.

    Raises:
        ValueError: an index that cannot be, or that does not fit the data.
    """
    if not is_packed(record):
        return record
    index, data = _index(record), record[PACKED].data
    arrays = ArrayRecord()
    end = len(data) - sum(length for *_, length in index)
    for name, dtype, shape, stype, length in index:
        begin, end = end, end + length
        arrays[name] = Array(dtype, tuple(shape), stype, data[begin:end])
    return arrays


def packed_sizes(record: ArrayRecord) -> tuple[int, int]:
    """Return the bytes of a packed record's index, as it claims, and of the whole."""
    data = record[PACKED].data
    return _index_end(data), len(data)


def record_bytes(record: ArrayRecord) -> int:
    """Return the bytes of the arrays in `record`, data and .npy headers, packed or not."""
    if is_packed(record):
        # Without a look into the index: what a client sent is not to be trusted yet.
        data = record[PACKED].data
        return max(len(data) - _index_end(data), 0)
    return sum(len(array.data) for array in record.values())


def update_metrics(
    partition: int,
    examples: int,
    update: LocalUpdate,
    *,
    state_lost: bool = False,
    data_changed: bool = False,
) -> dict[str, int | float]:
    """Return the metrics of an update.

    `examples` is the number that the client trains on; `state_lost`: what it kept of its last round
    is gone; `data_changed`: its own images are others than in its first round of the run.
    ``epsilon`` is the privacy spent so far (0 without differential privacy), ``batch-size`` that of
    a device which could not bear the one asked for (0: as asked).
    """
    values = (
        partition,
        examples,
        update.examples,
        update.steps,
        update.skipped_batches,
        update.skipped_examples,
        update.loss,
        update.seconds,
        int(state_lost),
        update.epsilon or 0.0,
        update.batch_size,
        int(data_changed),
    )
    return dict(zip(TRAIN_METRICS, values, strict=True))


def evaluation_metrics(partition: int, examples: int, value: float, loss: float) -> MetricRecord:
    """Return the metrics of a client's own model on the examples that it keeps from training."""
    values = (partition, examples, value, loss)
    return MetricRecord(dict(zip(EVALUATION_METRICS, values, strict=True)))


def failure_reason(reply: Message | str) -> str:
    """Return why the client of an error reply failed: the last line of what it says, printable.

    `reply`: the message, or what an error says.
    """
    whole = reply if isinstance(reply, str) else reply.error.reason or ""
    said = whole[-_LONGEST_REASON:]
    lines = (printable(line) for line in reversed(said.split("\n")))
    return next((line for line in lines if line), "no reason given")


def data_record(summary: DataSummary) -> ConfigRecord:
    """Return `summary` as the record `DATA` of a message."""
    record = summary.to_record()
    fingerprint = record.pop(_FINGERPRINT)
    own = {k: v if isinstance(v, str) else list(v) for k, v in record.items() if v}
    told = {_FINGERPRINT: json.dumps(fingerprint)} if fingerprint else {}
    return ConfigRecord({**own, **told})


def told_data(content: RecordDict) -> DataSummary:
    """Return what a message tells of the experiment's images.

    Raises:
        UserError: nothing, or nothing that can be meant.
    """
    record = dict(content.config_records.get(DATA, ConfigRecord()))
    try:
        if isinstance(fingerprint := record.get(_FINGERPRINT), str):
            return DataSummary.from_record(record | {_FINGERPRINT: json.loads(fingerprint)})
        return DataSummary.from_record(record)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"the server's message does not say what the experiment's images are like: {error}"
        ) from None


def join_request(summary: DataSummary) -> RecordDict:
    """Return the content of the query by which the server asks a client who it is."""
    return RecordDict({DATA: data_record(summary)})


def join_answer(partition: int, examples: int, labels: Sequence[int] = ()) -> RecordDict:
    """Return a client's answer to `join_request`: its partition and how many images it holds.

    `labels`: how many of each class, in the order of the experiment's; none where it does not tell.
    """
    told: dict[str, int | float | list[int] | list[float]] = {
        PARTITION: partition,
        EXAMPLES: examples,
    }
    if labels:
        told[LABELS] = list(labels)
    return RecordDict({METRICS: MetricRecord(told)})


def _index(record: ArrayRecord) -> list[tuple[str, str, list[int], str, int]]:
    """Return name, dtype, shape, kind and bytes of every array in a packed record."""
    data = record[PACKED].data
    try:
        return _checked_index(json.loads(data[8 : _index_end(data)]), len(data), _index_end(data))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"a packed record whose index cannot be read: {error}") from None


def _checked_index(index: Any, size: int, start: int) -> list[tuple[str, str, list[int], str, int]]:
    for name, dtype, shape, stype, length in index:
        if not all(isinstance(value, str) for value in (name, dtype, stype)):
            raise ValueError("a packed record whose index names no arrays")
        if not all(type(value) is int and value >= 0 for value in (length, *shape)):
            raise ValueError("a packed record whose index has sizes that cannot be")
    if start + sum(length for *_, length in index) != size:
        raise ValueError("a packed record whose index does not fit its data")
    return [tuple(entry) for entry in index]


def _index_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _array(value: np.ndarray) -> Array:
    if value.dtype.hasobject:
        raise ValueError("an array of Python objects cannot be sent")
    value = np.asarray(value, order="C")
    array = copy(_without_data(value.dtype, value.shape))
    array.data = npy_header(value.dtype, value.shape) + value.tobytes()
    return array


@lru_cache(maxsize=4096)
def _without_data(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    # Copied with its data put in, an array is made in a third of the time.
    return Array(str(dtype), shape, _STYPE, b"")


def _value(array: Array) -> np.ndarray:
    """Return a writable copy of the array."""
    dtype = _USUAL.get(array.dtype)
    if dtype is not None:
        header = npy_header(dtype, tuple(array.shape))
        size = len(header) + math.prod(array.shape) * dtype.itemsize
        if len(array.data) == size and array.data.startswith(header):
            flat = np.frombuffer(array.data, dtype, offset=len(header))
            return flat.reshape(array.shape).copy()
    return array.numpy()


# How `Array` says that its data is an .npy file, and the dtypes that models are made of.
_STYPE = "numpy.ndarray"
# Key of the fingerprint in the record `DATA`: JSON, because a ConfigRecord holds no records.
_FINGERPRINT = "fingerprint"
# Of a longer traceback, the end.
_LONGEST_REASON = 1 << 14
_USUAL = {name: np.dtype(name) for name in ("float32", "float64", "int64")}
