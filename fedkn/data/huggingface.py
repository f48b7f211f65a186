"""Data sets of Hugging Face `datasets`: saved in a folder, or returned by a source of one's own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedkn.data.assembly import Part, assembled
from fedkn.data.decoding import Encoded, decode_files
from fedkn.data.examples import Source
from fedkn.data.optional import require
from fedkn.errors import FedknError, UserError
from fedkn.text import printable

__all__ = ["is_huggingface", "load_huggingface", "parts_of"]

_OPTIONS = ("input", "target", "client", "train", "test")
# Names of columns that mean the same nearly everywhere, the first that is there.
_INPUTS = ("input", "inputs", "image", "img", "pixel_values", "x")
_TARGETS = ("target", "targets", "label", "labels", "y")
_CLIENTS = ("client", "client_id")
_SPLITS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")


def load_huggingface(
    root: Path | None,
    options: Mapping[str, Any],
    image_size: int = 0,
    *,
    skip_damaged: bool = False,
) -> Source:
    """Return the data set that ``save_to_disk`` wrote into the folder `root`. No hub is asked.

    Columns are told by the options ``input``, ``target`` and ``client`` (whose each example is),
    splits by ``train`` and ``test``; what is not told is looked for under the usual names.
    Images are decoded as those of image folders are, numbers are taken in their own type, and the
    names of a `ClassLabel` are the classes. Without a split for tests a fifth is held out.

    Raises
    ------
    UserError
        `datasets` is not installed, the folder holds no such data set, or a column or a split is
        not there or does not fit.
    """
    if root is None:
        raise UserError(
            "source 'huggingface' needs the folder of a data set that save_to_disk wrote: set "
            "data.root (--root DIR)"
        )
    if unknown := [name for name in options if name not in _OPTIONS]:
        raise UserError(
            f"data.options.{printable(unknown[0], 60)} is none of source 'huggingface': give "
            f"{', '.join(_OPTIONS)}"
        )
    where = printable(root)
    if not root.is_dir():
        raise UserError(f"no folder {where}: set data.root (--root DIR) to a data set's folder")
    with _offline():
        library = require("datasets", "datasets", "huggingface")
        try:
            saved = library.load_from_disk(os.fspath(root))
        # What the library raises on a damaged folder is of many kinds.
        except Exception as error:
            raise UserError(
                f"{where} is no data set that save_to_disk wrote: {type(error).__name__}: "
                f"{printable(error, 200)}"
            ) from error
        parts, classes = parts_of(
            where, saved, options, image_size=image_size, skip_damaged=skip_damaged
        )
    return assembled("huggingface", where, parts, classes)


def is_huggingface(value: Any) -> bool:
    """Whether `value` is a `Dataset` or `DatasetDict` of the library, which need not be here."""
    return any(
        cls.__module__.partition(".")[0] == "datasets"
        and cls.__name__ in ("Dataset", "DatasetDict")
        for cls in type(value).__mro__
    )


def parts_of(
    where: str,
    given: Any,
    options: Mapping[str, Any] | None = None,
    *,
    image_size: int = 0,
    skip_damaged: bool = False,
) -> tuple[list[Part], tuple[str, ...] | None]:
    """Return the training part of a `Dataset` or `DatasetDict`, that for tests, and the classes.

    Raises
    ------
    UserError
        As `load_huggingface`.
    """
    told = options or {}
    parts, classes = [], None
    for kind, split in _splits(where, given, told).items():
        inputs, targets, clients = (
            _column(where, split, told.get(key), usual, key)
            for key, usual in (("input", _INPUTS), ("target", _TARGETS), ("client", _CLIENTS))
        )
        if inputs is None or targets is None:
            lacking = "input" if inputs is None else "target"
            raise UserError(
                f"{where}: which column is the {lacking}? It has "
                f"{printable(', '.join(split.column_names), 200)}: set data.options.{lacking}, or "
                f"rename the column to '{lacking}'"
            )
        classes = _class_names(split.features[targets])
        parts.append(
            Part(
                _inputs(f"{where}: '{inputs}'", split, inputs, image_size, skip_damaged),
                _values(f"{where}: '{targets}'", split, targets),
                None if clients is None else _values(f"{where}: '{clients}'", split, clients),
                (f"{kind} {inputs}", f"{kind} {targets}", f"{kind} {clients}"),
            )
        )
    return parts, classes


def _splits(where: str, given: Any, told: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given, dict):
        for key in ("train", "test"):
            if key in told:
                raise UserError(f"{where} has no splits: leave data.options.{key} out")
        return {"train": given}
    found = {}
    for kind, usual in _SPLITS.items():
        name = told.get(kind) or next((one for one in usual if one in given), None)
        if name is not None and name not in given:
            raise UserError(
                f"{where} has no split '{printable(name, 60)}' but {printable([*given], 200)}: set "
                f"data.options.{kind}"
            )
        if name is not None:
            found[kind] = given[name]
    if "train" not in found:
        if len(given) != 1:
            raise UserError(
                f"{where}: which split is for training? It has {printable([*given], 200)}: set "
                "data.options.train"
            )
        found = {"train": next(iter(given.values()))}
    return found


def _column(where: str, split: Any, told: Any, usual: tuple[str, ...], key: str) -> str | None:
    if told is None:
        return next((name for name in usual if name in split.column_names), None)
    if told not in split.column_names:
        raise UserError(
            f"{where} has no column '{printable(told, 60)}' but "
            f"{printable(', '.join(split.column_names), 200)}: set data.options.{key}"
        )
    return str(told)


def _class_names(feature: Any) -> tuple[str, ...] | None:
    names = getattr(feature, "names", None)
    return tuple(names) if type(feature).__name__ == "ClassLabel" and names else None


def _inputs(what: str, split: Any, name: str, image_size: int, skip_damaged: bool) -> np.ndarray:
    feature = split.features[name]
    if type(feature).__name__ != "Image":
        if image_size:
            raise UserError(f"data.image_size is for images, and {what} are none: leave 0")
        return _values(what, split, name)
    if skip_damaged:
        raise UserError("data.skip_damaged is for files in folders: leave it at false")
    # As bytes, so that nothing but fedkn's own decoding opens them.
    encoded = split.cast_column(name, type(feature)(decode=False))
    decoded = decode_files([*_encoded(what, encoded, name)], image_size)
    return np.concatenate([*decoded.chunks])


def _encoded(what: str, split: Any, name: str) -> Iterator[Encoded | str]:
    for number, image in enumerate(split[name]):
        content, path = (image or {}).get("bytes"), (image or {}).get("path")
        if content is not None:
            yield Encoded(f"{what} {number}", bytes(content))
        elif path and Path(path).is_file():
            yield str(path)
        else:
            raise UserError(f"{what} {number} is no image, nor a file that is here")


def _values(what: str, split: Any, name: str) -> np.ndarray:
    """Return the numbers or texts of a column, in the type that they are stored in."""
    try:
        array = split.with_format("arrow")[:].column(name).combine_chunks()
        shape = [len(array)]
        while True:
            if hasattr(array, "storage"):
                array = array.storage
            elif hasattr(array, "value_lengths"):
                lengths = array.value_lengths().to_numpy(zero_copy_only=False)
                if len(lengths) and (lengths != lengths[0]).any():
                    raise UserError(
                        f"{what} holds lists of {int(min(lengths))} to {int(max(lengths))} values: "
                        "give examples of one shape"
                    )
                shape.append(int(lengths[0]) if len(lengths) else 0)
                array = array.flatten()
            else:
                break
        if array.null_count:
            raise UserError(f"{what} lacks {array.null_count} values: leave these examples out")
        values = array.to_numpy(zero_copy_only=False)
    except FedknError:
        raise
    except Exception as error:
        raise UserError(
            f"{what} are no numbers of one shape: {type(error).__name__}: {printable(error, 200)}"
        ) from error
    if values.dtype == object and all(isinstance(one, str) for one in values):
        values = values.astype(str)
    found: np.ndarray = values.reshape(shape)
    return found


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the library from asking its hub for anything."""
    before = {name: os.environ.get(name) for name in _OFFLINE}
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
