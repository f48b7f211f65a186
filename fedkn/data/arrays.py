"""Images from one .npz file."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from fedkn.data.examples import Examples, Source
from fedkn.data.split import stratified_split
from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["load_arrays"]

_NAMED = 12
# So many classes may be there with a few examples of a few of them, as on a device.
_FEW_CLASSES = 100


def load_arrays(root: Path | None) -> Source:
    """Return the images of the .npz file `root`; nothing in it is ever unpickled.

    ``images`` is (N, H, W), (N, H, W, C) or (N, C, H, W): of the second and the last axis, the
    shorter holds the channels. It is uint8, or floating point in [0, 1]. ``labels`` holds N
    integers from 0. ``test_images`` and ``test_labels`` are alike; without them a stratified fifth
    is held out by a draw that is always the same. ``classes``, optional, holds the classes' names.
    Without it they are the numbers up to the largest label; a file that lacks the first or the last
    of the classes, or more than half of more than a hundred, needs it.

    Raises
    ------
    UserError
        No such file, not an intact .npz, one that would not fit into memory, or an array that does
        not fit this description.
    """
    if root is None:
        raise UserError("source 'arrays' needs a .npz file: set data.root (--root FILE.npz)")
    where = printable(root)
    entries = _read(root)
    if ("test_images" in entries) != ("test_labels" in entries):
        raise UserError(f"{where} must have both 'test_images' and 'test_labels', or neither")
    prefixes = [prefix for prefix in ("", "test_") if f"{prefix}images" in entries]
    labels = {
        prefix: _labels(f"{where}: '{prefix}labels'", entries[f"{prefix}labels"])
        for prefix in prefixes
    }
    classes = _classes(where, entries, labels)
    parts = []
    for prefix in prefixes:
        images = _images(f"{where}: '{prefix}images'", entries.pop(f"{prefix}images"))
        try:
            data = Examples(torch.from_numpy(images), torch.from_numpy(labels[prefix]), classes)
        except UserError as error:
            raise UserError(f"{where}, '{prefix}images' and '{prefix}labels': {error}") from error
        parts.append(data)
    if len(parts) == 2:
        return Source("arrays", parts[0], parts[1])
    whole = parts[0]
    kept, held = stratified_split(whole.targets, 0.2, seed=0, purpose="test images of arrays")
    return Source("arrays", whole.select(kept), whole.select(held), held_out=True)


@dataclass(frozen=True)
class _Declared:
    """What the header of an array says."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


_WANTED = ("images", "labels", "test_images", "test_labels", "classes")


def _read(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the file that have a name of ours, having looked at all headers."""
    where = printable(path)
    if not path.is_file():
        raise UserError(
            f"no .npz file at {where}: set data.root (--root FILE.npz) to a file written by "
            "numpy.savez with arrays 'images' and 'labels'"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            found = [name.removesuffix(".npy") for name in archive.namelist()]
            _check_names(where, archive, found)
            wanted = [name for name in _WANTED if name in found]
            _check_size(where, sum(_declared(archive, name).nbytes for name in wanted))
            return {name: _array(archive, name) for name in wanted}
    except UserError:
        raise
    # What zipfile and NumPy raise on damaged bytes ranges from BadZipFile to UnicodeDecodeError.
    except Exception as error:
        reason = printable(error) or type(error).__name__
        raise UserError(f"{where} is not an intact .npz file: {reason}") from error


def _declared(archive: zipfile.ZipFile, name: str) -> _Declared:
    """Return what the header says. Raises ValueError where the member holds more or less."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        # Version 3 differs from 2 in the encoding of names of fields alone, which ours have not.
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(member)
        if dtype.hasobject:
            raise ValueError(f"'{printable(name)}' holds pickled objects, which could run code")
        declared = _Declared(shape, dtype)
        held = archive.getinfo(f"{name}.npy").file_size - member.tell()
    if min(shape, default=0) < 0 or declared.nbytes != held:
        raise ValueError(f"'{printable(name)}' is declared as {declared}, but has {held} bytes")
    return declared


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as member:
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
        return array


def _check_names(where: str, archive: zipfile.ZipFile, found: Sequence[str]) -> None:
    missing = next((name for name in ("images", "labels") if name not in found), None)
    if missing is None:
        return
    shown = [f"{printable(name, 60)} {_described(archive, name)}" for name in found[:_NAMED]]
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    raise UserError(
        f"{where} has no array '{missing}' (found: {', '.join(shown) or 'none'}{more}): write it "
        "again by numpy.savez(FILE, images=…, labels=…), and test_images=…, test_labels=… if there "
        "are any"
    )


def _described(archive: zipfile.ZipFile, name: str) -> str:
    try:
        return str(_declared(archive, name))
    # Of what is not asked for only that it is there matters.
    except Exception:
        return "(no plain array)"


def _check_size(where: str, needed: int) -> None:
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"{where} holds {needed / 1e9:.1f} GB of arrays, and {free / 1e9:.1f} GB of memory are "
            "free: store fewer or smaller images, or use an image_folder"
        )


def _images(what: str, images: np.ndarray) -> np.ndarray:
    if images.ndim not in (3, 4):
        raise UserError(
            f"{what} must be (N, H, W), (N, H, W, C) or (N, C, H, W), got {images.shape}"
        )
    return np.ascontiguousarray(_channels_first(what, _to_uint8(what, images)))


def _to_uint8(what: str, images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{what} must be uint8, or floating point in [0, 1], got {images.dtype}")
    if not np.isfinite(images).all():
        raise UserError(f"{what} contains NaN or infinity")
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"{what} in floating point must lie in [0, 1], found "
            f"{images.min():g}..{images.max():g}: divide by 255 or store uint8"
        )
    scaled: np.ndarray = np.rint(images * 255)
    return scaled.astype(np.uint8)


def _channels_first(what: str, images: np.ndarray) -> np.ndarray:
    if images.ndim == 3:
        return images[:, None]
    if images.shape[1] == images.shape[3]:
        raise UserError(
            f"which axis of {what} {images.shape} holds the channels is ambiguous: "
            "store grey images as (N, H, W), or pad them"
        )
    return images if images.shape[1] < images.shape[3] else np.moveaxis(images, 3, 1)


def _labels(what: str, labels: np.ndarray) -> np.ndarray:
    """Return the labels as int64 (N,), none of them negative."""
    if labels.ndim != 1:
        raise UserError(
            f"{what} must be one-dimensional, got {labels.shape}: give {_flat(labels)} instead"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{what} must hold integers, got {labels.dtype}: {_integers(labels)}")
    if labels.size and labels.min() < 0:
        raise UserError(
            f"{what} holds {labels.min()} (first at index {int(labels.argmin())}): labels count "
            "from 0; remove examples without a label"
        )
    if labels.size and labels.max() > _LARGEST:
        raise UserError(f"{what} holds {labels.max()}{_perhaps_negative(labels)}: {_RENUMBER}")
    return labels.astype(np.int64)


# Beyond any number of classes; here so that no label overflows int64.
_LARGEST = 2**31 - 1
_RENUMBER = (
    "labels count from 0; renumber them by numpy.unique(labels, return_inverse=True)[1], or add "
    "'classes', an array of one name for each label"
)


def _flat(labels: np.ndarray) -> str:
    if labels.ndim == 2 and labels.shape[1] > 1:
        return "labels.argmax(1), if these are one-hot,"
    return "labels.ravel()"


def _integers(labels: np.ndarray) -> str:
    if labels.dtype == bool:
        return "store labels.astype(int)"
    if np.issubdtype(labels.dtype, np.floating):
        bad = ~np.isfinite(labels) | (labels != np.floor(labels))
        if bad.any():
            return f"{labels[bad][0]} is no label; remove examples without one"
        return "store labels.astype(int)"
    return "store labels from 0, and the names of the classes as 'classes'"


def _perhaps_negative(labels: np.ndarray) -> str:
    """Return a hint where the largest label is what -1 becomes in a type without a sign."""
    unsigned = np.issubdtype(labels.dtype, np.unsignedinteger)
    if unsigned and labels.max() == np.iinfo(labels.dtype).max:
        return f", which is -1 stored as {labels.dtype}"
    return ""


def _classes(
    where: str, entries: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]
) -> tuple[str, ...]:
    """Return the names of the classes, having checked that the labels lie among them."""
    given = entries.get("classes")
    present = np.unique(np.concatenate(list(labels.values())))
    if given is None:
        return _numbered(where, entries, present)
    if given.dtype.kind != "U" or given.ndim != 1:
        raise UserError(
            f"{where}: 'classes' must be a one-dimensional array of text, "
            f"got {given.dtype} {given.shape}"
        )
    for prefix, own in labels.items():
        if own.size and own.max() >= len(given):
            hint = _perhaps_negative(entries[f"{prefix}labels"])
            raise UserError(
                f"{where}: '{prefix}labels' must lie in 0..{len(given) - 1}, because 'classes' has "
                f"{len(given)} names, found {own.max()}{hint}"
            )
    return tuple(str(name) for name in given)


def _numbered(
    where: str, entries: Mapping[str, np.ndarray], present: np.ndarray
) -> tuple[str, ...]:
    """Return the numbers up to the largest label, unless that makes empty classes by mistake."""
    if not present.size:
        return ("0",)
    largest, count = int(present[-1]), len(present)
    if largest + 1 > max(_FEW_CLASSES, 2 * count):
        hints = [
            _perhaps_negative(entries[f"{prefix}labels"])
            for prefix in ("", "test_")
            if f"{prefix}labels" in entries
        ]
        raise UserError(
            f"{where}: the labels are {count} different numbers up to {largest}{max(hints)}: "
            f"{_RENUMBER}"
        )
    if present[0] > 0:
        raise UserError(
            f"{where}: the labels run from {present[0]} to {largest}, and none is 0: labels count "
            f"from 0; subtract {present[0]}, or add 'classes', an array of {largest + 1} names, if "
            "the first ones have no example here"
        )
    return tuple(str(label) for label in range(largest + 1))
