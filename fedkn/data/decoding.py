"""Decoding image files with Pillow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fedkn.data.decoded import Decoded
from fedkn.data.optional import require
from fedkn.errors import UserError

__all__ = ["decode_files"]

_BATCH = 64
_ORIENTATION = 0x0112
_TURNED_BY_A_QUARTER = range(5, 9)
_GREY_MODES = frozenset({"1", "L", "LA"})
_DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "F"})


def decode_files(paths: Sequence[str], image_size: int) -> Decoded:
    """Read the headers of all files, then return their pixels to be decoded chunk by chunk.

    Images are turned upright (EXIF); they are grey (1 channel) if all files are grey, RGB (3)
    otherwise, transparency dropped. With `image_size` S > 0 the central square of each is resized
    to S x S (bilinear with antialiasing).

    Raises
    ------
    UserError
        Pillow is not installed, a file cannot be decoded or has more than 8 bits a channel, or
        sizes differ and `image_size` is 0.
    """
    sizes: dict[tuple[int, int], str] = {}
    grey = True
    for path in paths:
        size, mode = _header(path)
        sizes.setdefault(size, path)
        grey = grey and mode in _GREY_MODES
    if not image_size and len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise UserError(
            f"images differ in size ({first} is {one[0]}x{one[1]}, {second} is "
            f"{other[0]}x{other[1]} pixels): set data.image_size to resize all to one size"
        )
    width, height = (image_size, image_size) if image_size else next(iter(sizes))
    channels = 1 if grey else 3
    return Decoded((len(paths), channels, height, width), _batches(paths, channels, image_size))


def _batches(paths: Sequence[str], channels: int, image_size: int) -> Iterator[np.ndarray]:
    def decode(batch: Sequence[str]) -> np.ndarray:
        return np.stack([_pixels(path, channels, image_size) for path in batch])

    # Pillow decodes outside the interpreter's lock. A window of one batch per thread at a time
    # bounds what waits in memory to be written.
    threads = os.cpu_count() or 1
    batches = [paths[start : start + _BATCH] for start in range(0, len(paths), _BATCH)]
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(batches), threads):
            yield from pool.map(decode, batches[start : start + threads])


def _header(path: str) -> tuple[tuple[int, int], str]:
    """Return the upright (width, height) and Pillow's mode."""
    try:
        with _pillow("Image").open(path) as image:
            width, height = image.size
            if image.getexif().get(_ORIENTATION) in _TURNED_BY_A_QUARTER:
                width, height = height, width
            mode = str(image.mode)
    # What Pillow raises on damaged bytes ranges from OSError to SyntaxError.
    except Exception as error:
        raise _undecodable(path, error) from error
    if mode in _DEEP_MODES:
        raise UserError(f"{path} has more than 8 bits a channel: convert it to 8 bits")
    return (width, height), mode


def _pixels(path: str, channels: int, image_size: int) -> np.ndarray:
    """Return uint8 (C, H, W)."""
    pillow, operations = _pillow("Image"), _pillow("ImageOps")
    try:
        with pillow.open(path) as file:
            image = operations.exif_transpose(file).convert("L" if channels == 1 else "RGB")
    except Exception as error:
        raise _undecodable(path, error) from error
    if image_size:
        image = operations.fit(image, (image_size, image_size), pillow.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def _undecodable(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"cannot decode {Path(path)}: {reason}; replace or remove that file")


def _pillow(module: str) -> Any:
    return require(f"PIL.{module}", "Pillow", "device")
