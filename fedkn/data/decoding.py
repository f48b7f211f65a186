"""Decoding image files with Pillow: the one place that opens an image."""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fedkn.data.decoded import Decoded
from fedkn.data.optional import require
from fedkn.errors import UserError
from fedkn.text import printable

__all__ = [
    "EXTENSIONS",
    "Encoded",
    "Header",
    "UnusableImage",
    "decode",
    "decode_files",
    "header",
    "refusal",
    "unusable",
]

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
)
# Pillow goes by content, not by ending: without this list a photo.png that holds PostScript would
# start Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
# Pillow's own bound: a quarter of a GiB as RGB.
_MOST_PIXELS = 89_478_485
_MOST_BYTES = 512 * 2**20
_BATCH = 64
_ORIENTATION = 0x0112
_TURNED_BY_A_QUARTER = range(5, 9)
_GREY_MODES = frozenset({"1", "L", "LA"})
# Of more than 8 bits, which Pillow has in grey alone, and what they are decoded to.
_DEEP_MODES: Mapping[str, np.dtype[Any]] = {
    **dict.fromkeys(("I", "I;16", "I;16B", "I;16L", "I;16N"), np.dtype(np.int32)),
    "F": np.dtype(np.float32),
}
_EIGHT_BITS = np.dtype(np.uint8)
# What a decoder is told of pixels of more than 8 bits, such as "RGB;16B".
_DEEPER = re.compile(r";(?:10|12|14|16|24|32|64)")
_NAMED = 10


class UnusableImage(Exception):
    """A file that is no image that can be used; its text says why, in a few words."""


class Encoded(NamedTuple):
    """The content of an image file that is in memory, and what to call it."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


ImageSource = str | os.PathLike[str] | Encoded


class Header(NamedTuple):
    """What an image is before its pixels are decoded; `width` and `height` are those upright.

    `dtype` is uint8, or for grey images of more bits int32 or float32, which hold their values.
    """

    width: int
    height: int
    grey: bool
    dtype: np.dtype[Any] = _EIGHT_BITS


def header(path: ImageSource) -> Header:
    """Return the header of an image file. Not to be called by several threads at once.

    Raises
    ------
    UnusableImage
        No regular file, more than 512 MiB or about 89 million pixels, none of the formats behind
        `EXTENSIONS`, damaged, or in colour of more than 8 bits a channel, of which Pillow keeps 8.
    UserError
        Pillow is not installed.
    """
    # A warning as an error, because Pillow only warns of images up to twice its bound. The filters
    # are the process's, which is why only one thread may do this.
    with warnings.catch_warnings():
        warnings.simplefilter("error", _pillow("Image").DecompressionBombWarning)
        with _opened(path) as image:
            # First, because looking for EXIF may decode the image, after which nothing tells.
            mode, deeper = str(image.mode), _is_deeper(image)
            width, height = image.size
            if image.getexif().get(_ORIENTATION) in _TURNED_BY_A_QUARTER:
                width, height = height, width
    if mode in _DEEP_MODES:
        return Header(width, height, True, _DEEP_MODES[mode])
    if deeper:
        raise UnusableImage(
            "has more than 8 bits a channel in colour, of which only 8 can be read: convert it to "
            "8 bits, or store all as arrays (.npz)"
        )
    return Header(width, height, mode in _GREY_MODES)


def decode(
    path: ImageSource,
    channels: int,
    size: tuple[int, int] | None,
    dtype: np.dtype[Any] = _EIGHT_BITS,
) -> np.ndarray:
    """Return pixels (`channels`, H, W) of `dtype`, turned upright (EXIF), grey (1) or RGB (3).

    `dtype` is what the `header` says: of more than 8 bits, values are as the file has them. `size`
    is (width, height): the central part of these proportions is resized to it (bilinear with
    antialiasing). None: as it is. Look at the `header` first: what that refuses is not looked for
    here. Raises UnusableImage if the pixels cannot be decoded, or hold NaN or infinity.
    """
    pillow, operations = _pillow("Image"), _pillow("ImageOps")
    with _opened(path) as file:
        if dtype == np.uint8:
            mode = "L" if channels == 1 else "RGB"
        else:
            mode = "I" if dtype == np.int32 else "F"
        image = operations.exif_transpose(file).convert(mode)
        if size is not None and image.size != size:
            image = operations.fit(image, size, pillow.Resampling.BILINEAR)
        pixels = np.array(image, dtype=dtype)
    if dtype == np.float32 and not np.isfinite(pixels).all():
        raise UnusableImage("holds NaN or infinity")
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def decode_files(
    paths: Sequence[ImageSource], image_size: int, *, skip_damaged: bool = False
) -> Decoded:
    """Read the headers of all files, then return their pixels to be decoded chunk by chunk.

    Images are turned upright (EXIF); they are grey (1 channel) if all files are grey, RGB (3)
    otherwise, transparency dropped. Grey images of more than 8 bits keep their values, as int32 or
    float32, where most files are such; files unlike most others cannot be used. With `image_size`
    S > 0 the central square of each is resized to S x S (bilinear with antialiasing). With
    `skip_damaged` the files that cannot be used are left out, and named in ``left_out`` of what is
    returned once the chunks are through.

    Raises
    ------
    UserError
        Pillow is not installed, sizes differ and `image_size` is 0, no file can be used; or, once
        the chunks are through, not all of them can, naming them.
    """
    left_out: dict[int, str] = {}
    headers: dict[int, Header] = {}
    for index, path in enumerate(paths):
        try:
            headers[index] = header(path)
        except UnusableImage as error:
            left_out[index] = str(error)
    kinds = Counter(found.dtype for found in headers.values())
    # Where two are as many, 8 bits.
    dtype = max(kinds, key=lambda kind: (kinds[kind], kind == np.uint8), default=_EIGHT_BITS)
    good: list[int] = []
    sizes: dict[tuple[int, int], ImageSource] = {}
    grey = True
    for index, found in headers.items():
        if found.dtype != dtype:
            left_out[index] = (
                f"has {_BITS[found.dtype.name]}, and most others {_BITS[dtype.name]}: convert all "
                "to one"
            )
            continue
        good.append(index)
        sizes.setdefault((found.width, found.height), paths[index])
        grey = grey and found.grey
    if not good:
        raise UserError(unusable(paths, left_out))
    if not image_size and len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise UserError(
            f"images differ in size ({printable(first)} is {one[0]}x{one[1]}, {printable(second)} "
            f"is {other[0]}x{other[1]} pixels): set data.image_size to resize all to one size"
        )
    width, height = size = (image_size, image_size) if image_size else next(iter(sizes))
    channels = 1 if grey else 3

    def chunks() -> Iterator[np.ndarray]:
        for images, failed in _batches(
            paths, good, partial(decode, channels=channels, size=size, dtype=dtype)
        ):
            left_out.update(failed)
            if len(images):
                yield images
        if len(left_out) == len(paths):
            raise UserError(unusable(paths, left_out))
        if left_out and not skip_damaged:
            raise refusal(paths, left_out)

    return Decoded((len(good), channels, height, width), chunks(), left_out, dtype.name)


_BITS = {
    "uint8": "8 bits a channel",
    "int32": "more than 8 bits a channel",
    "float32": "floating-point pixels",
}


def _is_deeper(image: Any) -> bool:
    """Whether the file has more than 8 bits a channel, whatever Pillow makes of them."""
    for tile in getattr(image, "tile", ()):
        told = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if told and _DEEPER.search(str(told[0])):
            return True
        # Of PPM the largest value is told.
        if image.format == "PPM" and any(isinstance(one, int) and one > 255 for one in told[1:]):
            return True
    return False


def refusal(paths: Sequence[ImageSource], left_out: dict[int, str]) -> UserError:
    """Return the error for files that cannot be used: `left_out` says why, by index."""
    return UserError(
        f"{unusable(paths, left_out)}; replace or remove them, or leave them out with "
        "data.skip_damaged=true"
    )


def unusable(paths: Sequence[ImageSource], left_out: dict[int, str]) -> str:
    """Return how many files cannot be used, and of the first ten the names and what is wrong."""
    shown = [f"{printable(paths[i])} {left_out[i]}" for i in sorted(left_out)[:_NAMED]]
    more = len(left_out) - len(shown)
    names = ", ".join(shown) + (f", and {more} more" if more else "")
    return f"{len(left_out)} of {len(paths)} image files cannot be used: {names}"


def _batches(
    paths: Sequence[ImageSource],
    indices: Sequence[int],
    decoded: Callable[[ImageSource], np.ndarray],
) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
    def batch(start: int) -> tuple[np.ndarray, dict[int, str]]:
        images, failed = [], {}
        for index in indices[start : start + _BATCH]:
            try:
                images.append(decoded(paths[index]))
            except UnusableImage as error:
                failed[index] = str(error)
        return np.stack(images) if images else np.empty((0, 0), np.uint8), failed

    # Pillow decodes outside the interpreter's lock. A window of one batch per thread at a time
    # bounds what waits in memory to be written.
    threads = os.cpu_count() or 1
    starts = range(0, len(indices), _BATCH)
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(starts), threads):
            yield from pool.map(batch, starts[first : first + threads])


@contextmanager
def _opened(path: ImageSource) -> Iterator[Any]:
    """Yield the Pillow image; what goes wrong with it meanwhile becomes an UnusableImage."""
    pillow = _pillow("Image")
    try:
        with _file(path) as file, pillow.open(file, formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise UnusableImage(_TOO_LARGE)
            yield image
    except UnusableImage:
        raise
    except (pillow.DecompressionBombWarning, pillow.DecompressionBombError):
        raise UnusableImage(_TOO_LARGE) from None
    except pillow.UnidentifiedImageError:
        raise UnusableImage(f"is damaged, or is none of {', '.join(_FORMATS)}") from None
    except OSError as error:
        raise UnusableImage(f"cannot be read: {printable(error.strerror or error)}") from error
    # What Pillow raises on damaged bytes ranges from OSError to SyntaxError.
    except Exception as error:
        raise UnusableImage(f"is damaged: {printable(error) or type(error).__name__}") from error


_TOO_LARGE = f"has more than {_MOST_PIXELS:,} pixels"


def _file(path: ImageSource) -> BinaryIO:
    if isinstance(path, Encoded):
        if not path.content:
            raise UnusableImage("is empty")
        return io.BytesIO(path.content)
    _check_file(Path(path).stat())
    return Path(path).open("rb")


def _check_file(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_a, name in _KINDS.items() if is_a(found.st_mode)), "no file")
        raise UnusableImage(f"is {kind}")
    if not found.st_size:
        raise UnusableImage("is empty")
    if found.st_size > _MOST_BYTES:
        raise UnusableImage(f"has more than {_MOST_BYTES // 2**20} MiB")


_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def _pillow(module: str) -> Any:
    return require(f"PIL.{module}", "Pillow", "device")
