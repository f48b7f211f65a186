"""Examples from one .npz file."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fedkn.data.assembly import Part, assembled
from fedkn.data.examples import Source
from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["load_arrays"]

_NAMED = 12


def load_arrays(root: Path | None) -> Source:
    """Return the examples of the .npz file `root`; nothing in it is ever unpickled.

    Inputs are ``images`` or ``inputs``. ``images`` is (N, H, W), (N, H, W, C) or (N, C, H, W): the
    channels are on the second axis or on the last, whichever alone has one to four. Where none has,
    they are on the one that is at most half as long as the sides of a square. ``inputs`` is as
    `Examples` has them: (N, F), (N, C, L), (N, C, H, W) or (N, C, D, H, W). Both are taken as they
    are, in the type that they are stored in.

    Targets are ``labels``, N integers from 0, or ``targets``: integers (N,), or (N, H, W) for every
    pixel, are classes; floating point, (N,) or (N, K), are numbers; truth values (N, K) are labels
    that may all hold. ``test_images`` and so on are alike; without them a stratified fifth is held
    out by a draw that is always the same. ``classes``, optional, holds the classes' names. Without
    it those of integers are the numbers up to the largest; a file that lacks the first or the last
    of the classes, or more than half of more than a hundred, needs it. ``clients``, optional, says
    whose each example is, by an integer or a name.

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
    inputs, targets = (next(name for name in names if name in entries) for names in _NEEDED)
    if (f"test_{inputs}" in entries) != (f"test_{targets}" in entries):
        raise UserError(f"{where} must have both 'test_{inputs}' and 'test_{targets}', or neither")
    prefixes = [prefix for prefix in ("", "test_") if f"{prefix}{inputs}" in entries]
    parts = []
    for prefix in prefixes:
        what = f"{prefix}{inputs}"
        values = entries.pop(what)
        if inputs == "images":
            values = _images(f"{where}: '{what}'", values)
        parts.append(
            Part(
                values,
                entries[f"{prefix}{targets}"],
                entries.get(f"{prefix}clients"),
                (what, f"{prefix}{targets}", f"{prefix}clients"),
            )
        )
    return assembled("arrays", where, parts, entries.get("classes"), labels=targets == "labels")


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


_NEEDED = (("images", "inputs"), ("labels", "targets"))
_WANTED = (
    *(f"{prefix}{name}" for prefix in ("", "test_") for names in _NEEDED for name in names),
    *("clients", "test_clients", "classes"),
)


def _read(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the file that have a name of ours, having looked at all headers."""
    where = printable(path)
    if not path.is_file():
        raise UserError(
            f"no .npz file at {where}: set data.root (--root FILE.npz) to a file written by "
            "numpy.savez with arrays 'images' and 'labels'"
        )
    try:
        if kind := _kind(path):
            raise UserError(
                f"{where} is {kind}, not an .npz file: write arrays by numpy.savez(FILE.npz, "
                "inputs=…, targets=…), or read it in a function of your own (data.source = "
                "'module:function')"
            )
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


def _kind(path: Path) -> str:
    """Return what a file is that is no .npz; empty where it may be one, or is nothing known."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PK"):
        return ""
    for begin, kind in _KINDS.items():
        if head.startswith(begin):
            return kind
    # Bytes changed at random are next to never text.
    if not head or any(byte < 32 and byte not in b"\t\n\r\f" for byte in head):
        return ""
    return "a CSV file" if path.suffix.lower() == ".csv" else "a text file (such as CSV)"


_HEAD = 512
_KINDS = {
    b"\x93NUMPY": "an .npy file of one array",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow (Feather) file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
    **{bytes((0x80, version)): "a pickle file" for version in range(2, 6)},
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"SQLite": "an SQLite file",
    b"MATLAB": "a MATLAB file",
}


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
    missing = next((names[0] for names in _NEEDED if not {*names} & {*found}), None)
    if missing is None:
        both = next((names for names in _NEEDED if {*names} <= {*found}), None)
        if both is None:
            return
        raise UserError(f"{where} has both '{both[0]}' and '{both[1]}': leave one of them out")
    shown = [f"{printable(name, 60)} {_described(archive, name)}" for name in found[:_NAMED]]
    more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    raise UserError(
        f"{where} has no array '{missing}' (found: {', '.join(shown) or 'none'}{more}): write it "
        "again by numpy.savez(FILE, images=…, labels=…), and test_images=…, test_labels=… if there "
        "are any (what are no images with labels: inputs=…, targets=…)"
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
            "free: store fewer or smaller examples, or use an image_folder"
        )


def _images(what: str, images: np.ndarray) -> np.ndarray:
    """Return images as (N, C, H, W)."""
    if images.ndim not in (3, 4):
        raise UserError(
            f"{what} must be (N, H, W), (N, H, W, C) or (N, C, H, W), got {images.shape}: what are "
            "no images is called 'inputs'"
        )
    if images.ndim == 3:
        return images[:, None]
    first = _channels_first(images.shape)
    if first is None:
        raise UserError(
            f"which axis of {what} {images.shape} holds the channels is ambiguous: call them "
            "'inputs', which are (N, C, H, W) (of (N, H, W, C): inputs=x.transpose(0, 3, 1, 2)), "
            "or store grey images as (N, H, W)"
        )
    return images if first else np.moveaxis(images, 3, 1)


def _channels_first(shape: tuple[int, ...]) -> bool | None:
    """Whether `shape` is (N, C, H, W), not (N, H, W, C); None where that cannot be told."""
    _, second, third, last = shape
    if (second in _FEW) != (last in _FEW):
        return second in _FEW
    if second in _FEW:
        return None
    # More channels than the third axis is long are as good a reading of some shapes.
    if third == last and 2 * second <= last:
        return True
    return False if second == third and 2 * last <= second else None


_FEW = (1, 2, 3, 4)
"""Channels of nearly all images, and next to no image's height or width."""
