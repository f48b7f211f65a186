"""A cache file of decoded images, so that a slow source is decoded once and then memory-mapped.

The file is an .npy of the pixels, behind which stand a JSON object and that object's length and
digest (24 bytes). The object holds the pixels' shape and digest, and the .npy header can be written
in one way only, so that no bit of the file can change unnoticed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["CACHE_FOLDER", "Decoded", "Mapped", "load_decoded"]

CACHE_FOLDER = ".fedkn-cache"
_HEADER = 128
_DIGEST = 16
_TAIL = 8 + _DIGEST
_BLOCK = 1 << 20
# Little-endian, as torch takes them on every machine that it runs on.
_TYPES = {"uint8": "|u1", "int32": "<i4", "float32": "<f4"}
_LOG = logging.getLogger("fedkn")


@dataclass(frozen=True)
class Decoded:
    """Images on their way into a cache file, in chunks along N.

    Attributes
    ----------
    shape
        (N, C, H, W); N is the most that there can be.
    chunks
        Arrays (n, C, H, W) of `dtype` whose n sum to N at most.
    left_out
        Why images were left out, by their index among all that were asked for; complete once the
        chunks are through.
    dtype
        One of uint8, int32 and float32.
    """

    shape: tuple[int, int, int, int]
    chunks: Iterable[np.ndarray]
    left_out: dict[int, str] = field(default_factory=dict)
    dtype: str = "uint8"


@dataclass(frozen=True)
class Mapped:
    """What a cache file holds.

    Attributes
    ----------
    images
        (N, C, H, W), memory-mapped copy-on-write: writing to it changes no file.
    left_out
        As in `Decoded`.
    """

    images: Tensor
    left_out: dict[int, str]


def load_decoded(root: Path, variant: str, key: str, decode: Callable[[], Decoded]) -> Mapped:
    """Return the images of the folder `root`, from their cache file or from `decode`.

    The file ``{variant}-{key}.npy`` lies in ``.fedkn-cache`` in `root` or, where that cannot be
    written, in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, fedkn/images/). It is written
    under a lock, beside its final name, and renamed: other processes wait for it or see it whole.
    It is read through and held against its digests at every call (a second for a GB or so); one
    that is damaged is decoded anew, which is logged. Files of the same variant with another key are
    out of date and removed.

    Parameters
    ----------
    root
        The folder the images come from.
    variant
        How they are decoded, without a hyphen; different variants live side by side.
    key
        Changes whenever the images do.
    decode
        Called only where no intact cache file exists.

    Raises
    ------
    UserError
        The cache file cannot be written.
    """
    name = f"{variant}-{key}.npy"
    folders = _folders(root)
    for folder in folders:
        if (mapped := _mapped(folder / name, _LOG.warning)) is not None:
            return mapped
    for folder in folders:
        if _writable(folder):
            try:
                with _locked(folder):
                    return _decode_into(folder, name, variant, decode)
            except OSError as error:
                raise UserError(
                    f"cannot write the decoded images to {folder}: {error.strerror or error}"
                ) from error
    raise UserError(
        "no place for the decoded images: make one of these folders writable, "
        f"or set XDG_CACHE_HOME: {', '.join(str(folder) for folder in folders)}"
    )


def _folders(root: Path) -> tuple[Path, Path]:
    root = root.resolve()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.blake2b(os.fsencode(root), digest_size=8).hexdigest()
    return root / CACHE_FOLDER, home / "fedkn" / "images" / digest


def _mapped(path: Path, warn: Callable[..., None]) -> Mapped | None:
    try:
        with path.open("rb") as file:
            shape, dtype, left_out = _checked(file)
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        warn(
            "the cache file %s is damaged (%s): its images are decoded anew",
            *(printable(path), printable(error)),
        )
        return None
    pixels = np.memmap(path, dtype=dtype, mode="c", offset=_HEADER, shape=shape)
    return Mapped(torch.from_numpy(pixels), left_out)


def _checked(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any], dict[int, str]]:
    """Return shape, type and what was left out. Raises ValueError if any bit is not as written."""
    size = file.seek(0, os.SEEK_END)
    if size < _TAIL:
        raise ValueError("it is cut short")
    file.seek(size - _TAIL)
    tail = file.read(_TAIL)
    length = int.from_bytes(tail[:8], "little")
    pixels = size - _HEADER - length - _TAIL
    if pixels < 0:
        raise ValueError("its end is not as written")
    file.seek(_HEADER + pixels)
    text = file.read(length)
    if _digest(text) != tail[8:]:
        raise ValueError("its end is not as written")
    note = json.loads(text)
    shape = tuple(int(side) for side in note["shape"])
    # What earlier versions wrote was of 8 bits.
    dtype = np.dtype(_TYPES[note.get("dtype", "uint8")])
    left_out = {int(index): str(reason) for index, reason in note["left_out"]}
    file.seek(0)
    if file.read(_HEADER) != _header(shape, dtype):
        raise ValueError("its header is not as written")
    if math.prod(shape) * dtype.itemsize != pixels or _digest_of(file, pixels) != note["digest"]:
        raise ValueError("its pixels are not as written")
    return shape, dtype, left_out


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Return the header of an .npy file, format version 1.0, padded to 128 bytes."""
    described = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    length = _HEADER - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + described.ljust(length - 1) + b"\n"


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def _digest_of(file: BinaryIO, size: int) -> str:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    while size > 0 and (block := file.read(min(_BLOCK, size))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        # Where the file system has no locks, two processes may both decode; the rename keeps the
        # result whole.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Only the holder of the lock writes, so these were left by processes that were killed.
            for abandoned in folder.glob("partial-*"):
                abandoned.unlink(missing_ok=True)
        yield


def _decode_into(folder: Path, name: str, variant: str, decode: Callable[[], Decoded]) -> Mapped:
    # Another process may have written it while this one waited for the lock. If the file is a
    # damaged one, that was said before.
    if (mapped := _mapped(folder / name, _LOG.debug)) is not None:
        return mapped
    _write(folder / name, decode())
    for stale in folder.glob(f"{variant}-*"):
        if stale.name != name:
            stale.unlink(missing_ok=True)
    written = _mapped(folder / name, _LOG.warning)
    if written is None:
        raise UserError(f"cannot read back the decoded images in {folder / name}")
    return written


def _write(path: Path, decoded: Decoded) -> None:
    size = math.prod(decoded.shape) * np.dtype(_TYPES[decoded.dtype]).itemsize
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(
            f"the decoded images need {size / 1e9:.1f} GB in {path.parent}, where "
            f"{free / 1e9:.1f} GB are free: free some, or set data.image_size to a smaller size"
        )
    temporary = path.parent / f"partial-{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            _write_images(file, decoded)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_images(file: BinaryIO, decoded: Decoded) -> None:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    images, dtype = 0, np.dtype(_TYPES[decoded.dtype])
    file.write(bytes(_HEADER))
    for chunk in decoded.chunks:
        content = np.ascontiguousarray(chunk, dtype=dtype).tobytes()
        images += len(chunk)
        digest.update(content)
        file.write(content)
    shape = (images, *decoded.shape[1:])
    note: dict[str, Any] = {
        "shape": shape,
        "digest": digest.hexdigest(),
        "left_out": sorted(decoded.left_out.items()),
    }
    if decoded.dtype != "uint8":
        note["dtype"] = decoded.dtype
    text = json.dumps(note).encode()
    file.write(text + len(text).to_bytes(8, "little") + _digest(text))
    # Last, because only now is known how many images there are.
    file.seek(0)
    file.write(_header(shape, dtype))
    file.flush()
    os.fsync(file.fileno())
