"""The gate: every update is checked before the strategy sees it.

Flower's strategies average what they are sent: NaN, arrays of shape (1,) that broadcast, negative
weights and 10^12 claimed examples. A refused update is named, with its reason, and the round goes
on with the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from numpy.lib import format as npy

from fedkn.config import TrainConfig
from fedkn.federation import (
    ARRAYS,
    EXAMPLES,
    METRICS,
    PARTITION,
    arrays_record,
    is_packed,
    packed,
    packed_sizes,
    unpacked,
)
from fedkn.npy_headers import npy_header
from fedkn.stack import Flat, Layout, Stack, distances
from fedkn.text import printable
from server.gate.plausible import named, numbers_in, training_ranges

__all__ = ["Claim", "RefusedUpdate", "Screen", "Update"]

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
    """An update that passed: from which partition, its arrays and metrics, each by name.

    Of a round's the arrays are rows of a `Stack`: on the host as far as they are read.
    """

    partition: int
    arrays: Mapping[str, np.ndarray]
    metrics: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Claim:
    """What a client sent, of the form of an update: names, shapes and numbers that can be.

    Its tensors' values were not looked at.
    """

    metrics: dict[str, float]
    tensors: Mapping[str, np.ndarray] | Flat


class Screen:
    """Checks updates against the tensors that were sent and what the clients declared on joining.

    First what each of them claims to be (`read`, `taken`), then the values of all at once
    (`accepted`), wherever these are.

    Args:
        sent: the global tensors of the round by name, as the clients received them.
        declared: partition id to number of examples.
        train: how clients were asked to train, which bounds the local steps they can have taken.
        max_norm: refuse an update farther than this (Euclidean, over all tensors) from `sent`;
            0 is no bound.
        round_timeout: seconds that the round waits. private: whether updates have an epsilon.
        least_loss: the task's.
        spreads, counts: the names of tensors that hold variances or deviations, and counts of
            batches. parameters: of tensors that are parameters, which are stacked by themselves.
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
        parameters: Collection[str] = (),
    ) -> None:
        self._sent = sent
        self._layout = Layout(sent, parameters)
        self._declared = declared
        self._train = train
        self._max_norm = max_norm
        self._round_timeout = round_timeout
        self._private = private
        self._least_loss = least_loss
        self._spreads, self._counts = (sent.keys() & set(names) for names in (spreads, counts))

    def check(self, message: Message) -> Update:
        """Return the update in `message`.

        Raises:
            RefusedUpdate: naming what does not fit.
        """
        (found,) = self.accepted([self.read(message)])
        if isinstance(found, RefusedUpdate):
            raise found
        return found

    def read(self, message: Message) -> Claim:
        """Return what `message` claims.

        Nothing is allocated before the declared sizes are known to fit.

        Raises:
            RefusedUpdate: naming what does not fit.
        """
        if not message.has_content():
            raise RefusedUpdate("no content")
        try:
            return self._read(message.content)
        except RefusedUpdate:
            raise
        except Exception as error:  # what a client sends may break any parser, but not the round
            raise RefusedUpdate(f"unreadable: {type(error).__name__}: {error}") from error

    def taken(self, metrics: Mapping[str, Any], tensors: Flat | ArrayRecord) -> Claim:
        """Return what a client of this machine claims, which sent no message.

        Raises:
            RefusedUpdate: as `read`.
        """
        numbers = self._metrics(metrics)
        if isinstance(tensors, Flat) and tensors.layout == self._layout:
            return Claim(numbers, tensors)
        assert isinstance(tensors, ArrayRecord)
        return Claim(numbers, self._arrays(tensors))

    def accepted(self, claims: Sequence[Claim]) -> list[Update | RefusedUpdate]:
        """Return the updates of `claims`, or why one is refused, in their order.

        Their tensors are copied into one `Stack`.
        """
        if not claims:
            return []
        stack = Stack.of(self._layout, [claim.tensors for claim in claims])
        reasons = self._not_finite(stack)
        batches = [claim.metrics[EXAMPLES] * self._train.local_epochs for claim in claims]
        for place, reason in self._odd_statistics(stack, batches).items():
            reasons.setdefault(place, reason)
        if self._max_norm:
            for place, norm in enumerate(distances(stack.rows(), self._sent, self._sent)):
                if norm > self._max_norm:
                    text = f"moves the weights by {norm:.3g}, more than {self._max_norm:.3g}"
                    reasons.setdefault(place, text)
        return [
            RefusedUpdate(reasons[place])
            if place in reasons
            else Update(int(claims[place].metrics[PARTITION]), row, claims[place].metrics)
            for place, row in enumerate(stack.rows())
        ]

    def _read(self, content: RecordDict) -> Claim:
        if content.config_records:
            raise RefusedUpdate(f"records not expected: {named(content.config_records)}")
        metrics = self._metrics(_only(content.metric_records, METRICS))
        record = _only(content.array_records, ARRAYS)
        if is_packed(record):
            self._check_packed(record)
        return Claim(metrics, self._arrays(unpacked(record)))

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

    def _metrics(self, record: Mapping[str, Any]) -> dict[str, float]:
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
            try:
                arrays[name] = _of_form(name, record[name], sent)
            except Exception:  # whatever breaks a parser
                # Of several things that are wrong, the first tensor's is named.
                before = [n for n, value in arrays.items() if not np.isfinite(value).all()]
                if not before:
                    raise
                raise RefusedUpdate(_NOT_FINITE.format(before[0])) from None
        return arrays

    def _not_finite(self, stack: Stack) -> dict[int, str]:
        """Return by place in the `stack` which tensor is not finite."""
        # A sum of finite numbers may overflow, but one with NaN or infinity in it is never finite.
        kinds = (part for part in stack.parts if part.is_floating_point() or part.is_complex())
        sums = [part.sum(1) for part in kinds]
        if not sums:
            return {}
        odd = ~torch.stack([found.isfinite() for found in sums]).all(0)
        reasons: dict[int, str] = {}
        for place in odd.nonzero().flatten().tolist():
            row = stack.rows()[place]
            if odd_ones := [name for name in self._sent if not np.isfinite(row[name]).all()]:
                reasons[place] = _NOT_FINITE.format(odd_ones[0])
        return reasons

    def _odd_statistics(self, stack: Stack, batches: Sequence[float]) -> dict[int, str]:
        """Return whose variances cannot be, or who counts more batches than it can have had.

        In the order of the `stack`; each of its clients had at most so many `batches`.
        """
        reasons: dict[int, str] = {}
        kinds = [name for name in self._sent if name in self._spreads | self._counts]
        for name in kinds:
            values = stack.host(name).reshape(len(stack), -1)
            for place in np.flatnonzero((values < 0).any(axis=1)).tolist():
                text = f"'{name}' is negative, which no variance or count can be"
                reasons.setdefault(place, text)
        for name in kinds:
            if name not in self._counts:
                continue
            sent, values = self._sent[name].reshape(1, -1), stack.host(name).reshape(len(stack), -1)
            # Float32 rounds what it counts.
            dtype = sent.dtype if sent.dtype.kind == "f" else np.dtype(np.float64)
            most = 1.001 * (sent + np.asarray(batches, dtype).reshape(-1, 1)) + 1
            for place in np.flatnonzero((values > most).any(axis=1)).tolist():
                text = f"'{name}' counts more than {batches[place]:.0f} batches in a round"
                reasons.setdefault(place, text)
        return reasons


def _only(records: Mapping[str, RecordT], key: str) -> RecordT:
    if set(records) != {key}:
        raise RefusedUpdate(f"expected one record '{key}', got {named(records) or 'none'}")
    return records[key]


_NOT_FINITE = "'{}' is not finite (training diverged, or garbage)"


def _of_form(name: str, array: Array, sent: np.ndarray) -> np.ndarray:
    """Return the value of `array`, read-only, which must be of the shape and dtype of `sent`."""
    header = npy_header(sent.dtype, sent.shape)
    as_expected = (
        array.stype == "numpy.ndarray"
        and tuple(array.shape) == sent.shape
        and array.dtype == str(sent.dtype)
        and len(array.data) == len(header) + sent.nbytes
        and array.data.startswith(header)
    )
    if as_expected:
        return np.frombuffer(array.data, sent.dtype, offset=len(header)).reshape(sent.shape)
    return _parsed(name, array, sent)


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
