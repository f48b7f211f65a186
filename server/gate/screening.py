"""The gate: every update is checked before the strategy sees it.

Flower's strategies average what they are sent: NaN, arrays of shape (1,) that broadcast, negative
weights and 10^12 claimed examples. A refused update is named, with its reason, and the round goes
on with the rest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.lib import format as npy

from fedkn.config import TrainConfig
from fedkn.federation import (
    ARRAYS,
    EXAMPLES,
    METRICS,
    PARTITION,
    arrays_record,
    is_packed,
    npy_header,
    packed,
    packed_sizes,
    unpacked,
)
from fedkn.text import printable
from server.gate.plausible import named, numbers_in, training_ranges

__all__ = ["RefusedUpdate", "Screen", "Update"]

# A client's index of packed tensors may be written a little differently.
_SLACK = 1 << 16

_LONGEST_REASON = 300

RecordT = TypeVar("RecordT")


class RefusedUpdate(Exception):
    """An update that fails the gate; the text is the reason, printable whatever stands in it."""

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason, _LONGEST_REASON))


@dataclass(frozen=True, eq=False)
class Update:
    """An update that passed: from which partition, its arrays and metrics, each by name."""

    partition: int
    arrays: dict[str, np.ndarray]
    metrics: dict[str, float]


class Screen:
    """Checks updates against the tensors that were sent and what the clients declared on joining.

    Args:
        sent: the global tensors of the round by name, as the clients received them.
        declared: partition id to number of examples.
        train: how clients were asked to train, which bounds the local steps they can have taken.
        max_norm: refuse an update farther than this (Euclidean, over all tensors) from `sent`;
            0 is no bound.
        round_timeout: seconds that the round waits. private: whether updates have an epsilon.
        least_loss: the task's.
        spreads, counts: the names of tensors that hold variances or deviations, and counts of
            batches.
    """

    def __init__(
        self,
        sent: Mapping[str, np.ndarray],
        declared: Mapping[int, int],
        train: TrainConfig,
        *,
        max_norm: float = 0.0,
        round_timeout: float = 0.0,
        private: bool = False,
        least_loss: float = 0.0,
        spreads: Collection[str] = (),
        counts: Collection[str] = (),
    ) -> None:
        self._sent = sent
        self._declared = declared
        self._train = train
        self._max_norm = max_norm
        self._round_timeout = round_timeout
        self._private = private
        self._least_loss = least_loss
        self._spreads, self._counts = (sent.keys() & set(names) for names in (spreads, counts))

    def check(self, message: Message) -> Update:
        """Return the update in `message`.

        Nothing is allocated before the declared sizes are known to fit.

        Raises:
            RefusedUpdate: naming what does not fit.
        """
        if not message.has_content():
            raise RefusedUpdate("no content")
        try:
            return self._update(message.content)
        except RefusedUpdate:
            raise
        except Exception as error:  # what a client sends may break any parser, but not the round
            raise RefusedUpdate(f"unreadable: {type(error).__name__}: {error}") from error

    def _update(self, content: RecordDict) -> Update:
        if content.config_records:
            raise RefusedUpdate(f"records not expected: {named(content.config_records)}")
        metrics = self._metrics(_only(content.metric_records, METRICS))
        record = _only(content.array_records, ARRAYS)
        if is_packed(record):
            self._check_packed(record)
        arrays = self._arrays(unpacked(record))
        self._check_statistics(arrays, metrics[EXAMPLES] * self._train.local_epochs)
        if self._max_norm:
            self._check_norm(arrays)
        return Update(int(metrics[PARTITION]), arrays, metrics)

    @cached_property
    def _packed_as_sent(self) -> tuple[int, int]:
        return packed_sizes(packed(arrays_record(self._sent)))

    def _check_packed(self, record: ArrayRecord) -> None:
        # Before the index is read: of any length, it would be many times as large in memory.
        for what, size, expected in zip(
            ("an index", "tensors"),
            packed_sizes(record),
            self._packed_as_sent,
            strict=True,
        ):
            if size > expected + _SLACK:
                raise RefusedUpdate(f"{what} of {size} bytes, where {expected} are expected")

    def _metrics(self, record: MetricRecord) -> dict[str, float]:
        partition = record.get(PARTITION)
        if type(partition) is not int or partition not in self._declared:
            raise RefusedUpdate(f"partition {partition} was not asked to train")
        if record.get("trained-examples") == 0:
            raise RefusedUpdate(
                "trained on no example: every batch was smaller than the normalizer needs"
            )
        declared, claimed = self._declared[partition], record.get(EXAMPLES)
        if type(claimed) is int and claimed != declared:
            raise RefusedUpdate(
                f"claims {printable(claimed, 40)} examples, but declared {declared} on joining"
            )
        ranges = training_ranges(
            self._train,
            partition,
            declared,
            round_timeout=self._round_timeout,
            private=self._private,
            least_loss=self._least_loss,
        )
        try:
            return numbers_in(record, ranges)
        except ValueError as error:
            raise RefusedUpdate(str(error)) from None

    def _arrays(self, record: ArrayRecord) -> dict[str, np.ndarray]:
        if record.keys() != self._sent.keys():
            odd = named(record.keys() ^ self._sent.keys())
            raise RefusedUpdate(f"tensors missing or not expected: {odd}")
        arrays: dict[str, np.ndarray] = {}
        for name, sent in self._sent.items():
            arrays[name] = _checked(name, record[name], sent)
        return arrays

    def _check_statistics(self, arrays: Mapping[str, np.ndarray], batches: float) -> None:
        """Refuse what would be no variance, and counts of more `batches` than there can be."""
        for name in self._spreads | self._counts:
            value = arrays[name]
            if value.size and value.min() < 0:
                raise RefusedUpdate(f"'{name}' is negative, which no variance or count can be")
        for name in self._counts:
            # Float32 rounds what it counts.
            most = 1.001 * (self._sent[name] + batches) + 1
            if (arrays[name] > most).any():
                raise RefusedUpdate(f"'{name}' counts more than {batches:.0f} batches in a round")

    def _check_norm(self, arrays: Mapping[str, np.ndarray]) -> None:
        squares = (
            float(np.square(array.astype(np.float64) - self._sent[name]).sum())
            for name, array in arrays.items()
        )
        norm = math.sqrt(sum(squares))
        if norm > self._max_norm:
            raise RefusedUpdate(f"moves the weights by {norm:.3g}, more than {self._max_norm:.3g}")


def _only(records: Mapping[str, RecordT], key: str) -> RecordT:
    if set(records) != {key}:
        raise RefusedUpdate(f"expected one record '{key}', got {named(records) or 'none'}")
    return records[key]


def _checked(name: str, array: Array, sent: np.ndarray) -> np.ndarray:
    """Return the value of `array`, read-only, which must be of the shape and dtype of `sent`."""
    header = npy_header(sent.dtype, sent.shape)
    as_expected = (
        array.stype == "numpy.ndarray"
        and tuple(array.shape) == sent.shape
        and array.dtype == str(sent.dtype)
        and len(array.data) == len(header) + sent.nbytes
        and array.data.startswith(header)
    )
    value = (
        np.frombuffer(array.data, sent.dtype, offset=len(header)).reshape(sent.shape)
        if as_expected
        else _parsed(name, array, sent)
    )
    if not np.isfinite(value).all():
        raise RefusedUpdate(f"'{name}' is not finite (training diverged, or garbage)")
    return value


def _parsed(name: str, array: Array, sent: np.ndarray) -> np.ndarray:
    """Return the value of an array whose header differs from NumPy's usual; name what is wrong."""
    if array.stype != "numpy.ndarray":
        raise RefusedUpdate(f"'{name}' is serialized as {array.stype!r}")
    # Read the header by itself: it may claim any size, and loading would allocate it.
    stream = BytesIO(array.data)
    try:
        version = npy.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = npy.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, _, dtype = npy.read_array_header_2_0(stream)
        else:
            raise RefusedUpdate(f"'{name}' has .npy version {version}")
    except ValueError as error:
        raise RefusedUpdate(f"'{name}' is no array: {error}") from None
    if tuple(array.shape) != sent.shape or shape != sent.shape:
        raise RefusedUpdate(
            f"'{name}' has shape {shape} (declared {tuple(array.shape)}), expected {sent.shape}"
        )
    if array.dtype != str(sent.dtype) or dtype != sent.dtype:
        raise RefusedUpdate(f"'{name}' has dtype {dtype}, expected {sent.dtype}")
    if len(array.data) - stream.tell() != sent.nbytes:
        raise RefusedUpdate(
            f"'{name}' carries {len(array.data) - stream.tell()} bytes, expected {sent.nbytes}"
        )
    return array.numpy()
