"""Reading a torch data set through, item by item, into arrays."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedkn.data.assembly import Part
from fedkn.data.values import as_array
from fedkn.errors import FedknError, UserError
from fedkn.text import printable

__all__ = ["is_dataset", "read_items"]

_LOG = logging.getLogger("fedkn")
_SECONDS = 5.0
_CHUNK = 1024


def is_dataset(value: Any) -> bool:
    """Whether `value` is a torch data set, or has items by number as one has."""
    by_number = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    plain = isinstance(value, np.ndarray | Tensor | str | bytes | tuple | list | dict)
    return isinstance(value, Dataset) or (by_number and not plain)


def read_items(where: str, dataset: Any, names: tuple[str, str, str]) -> Part:
    """Return the examples of `dataset`, whose items are (input, target) or (input, target, client).

    Every five seconds the log says how far it is. Memory is looked at after the first item, which
    foretells the others, and again on the way.

    Raises
    ------
    UserError
        No examples, an item of another form or shape than the first, one that cannot be had, or
        more of them than fit into memory; naming the item.
    """
    columns = [_Column("input"), _Column("target"), _Column("client")]
    known, parts, told = _length(dataset), 0, time.monotonic()
    for number, item in enumerate(_items(where, dataset, known)):
        at = f"{where}: item {number}"
        if not isinstance(item, tuple | list) or len(item) not in (2, 3):
            raise UserError(
                f"{at} is {type(item).__name__}, not (input, target): let the data set return a "
                "tuple of two, or of three with the client"
            )
        parts = parts or len(item)
        if len(item) != parts:
            raise UserError(f"{at} has {len(item)} parts, those before {parts}: let all be alike")
        for column, value in zip(columns, item, strict=False):
            column.add(at, value)
        if number % _CHUNK == 0:
            _check_memory(where, columns, known)
        if time.monotonic() - told > _SECONDS:
            told = time.monotonic()
            _LOG.info("%s: %d of %s examples read", where, number + 1, known or "?")
    if not parts:
        raise UserError(f"{where} has no examples: its data set is empty")
    return Part(
        columns[0].array(),
        columns[1].array(),
        columns[2].array() if parts == 3 else None,
        names,
    )


class _Column:
    """Values of one kind, put together chunk by chunk."""

    def __init__(self, kind: str) -> None:
        self.count = self.each = 0
        self._kind = kind
        self._like: tuple[tuple[int, ...], np.dtype[Any]] | None = None
        self._waiting: list[np.ndarray] = []
        self._chunks: list[np.ndarray] = []

    def add(self, at: str, value: Any) -> None:
        array = self._array(at, value)
        shape, dtype = self._like = self._like or (array.shape, array.dtype)
        if (array.shape, array.dtype.kind) != (shape, dtype.kind):
            raise UserError(
                f"{at}: its {self._kind} is {array.dtype} {array.shape}, the first one's {dtype} "
                f"{shape}: let all be alike (resize, crop or pad them)"
            )
        self.count, self.each = self.count + 1, array.nbytes
        self._waiting.append(array)
        if len(self._waiting) == _CHUNK:
            self._flush()

    def array(self) -> np.ndarray:
        self._flush()
        return np.concatenate(self._chunks)

    def _flush(self) -> None:
        if self._waiting:
            self._chunks.append(np.stack(self._waiting))
            self._waiting = []

    def _array(self, at: str, value: Any) -> np.ndarray:
        what = f"{at}: its {self._kind}"
        if hasattr(value, "convert") and hasattr(value, "mode"):
            raise UserError(
                f"{what} is a Pillow image: give the data set a transform that makes a tensor of "
                "it, such as torchvision.transforms.PILToTensor()"
            )
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            value = value.float()
        # A copy: a data set may hand out the same array again and again.
        array = np.array(as_array(what, value))
        if array.dtype.kind not in ("iuU" if self._kind == "client" else "biuf"):
            raise UserError(
                f"{what} is {type(value).__name__} ({array.dtype}), no number: let the data set "
                "return numbers or a tensor of them"
            )
        return array


def _items(where: str, dataset: Any, known: int | None) -> Iterator[Any]:
    number = 0
    try:
        if known is None:
            for item in dataset:
                yield item
                number += 1
            return
        for number in range(known):
            yield dataset[number]
    except FedknError:
        raise
    except Exception as error:
        raise UserError(
            f"{where}: item {number} cannot be read: {type(error).__name__}: "
            f"{printable(error, 200)}"
        ) from error


def _length(dataset: Any) -> int | None:
    """Return how many items there are; None of what can only be gone through."""
    if not hasattr(type(dataset), "__getitem__") or isinstance(
        dataset, torch.utils.data.IterableDataset
    ):
        return None
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _check_memory(where: str, columns: list[_Column], known: int | None) -> None:
    each = sum(column.each for column in columns)
    read = columns[0].count
    # What has been read is held twice while it is put together.
    needed = 2 * each * max(known or 0, read) - each * read
    free = psutil.virtual_memory().available
    if needed > free:
        count = f"{known:,}" if known else f"more than {read:,}"
        raise UserError(
            f"{where}: {count} examples of {each:,} bytes need {needed / 1e9:.1f} GB of memory, "
            f"and {free / 1e9:.1f} GB are free: return fewer or smaller examples"
        )
