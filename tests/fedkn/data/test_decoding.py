import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedkn.data.decoding import Header, UnusableImage, decode, header

ROOT = Path(__file__).parents[3]
_PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
_FORMATS = ("png", "jpeg", "bmp", "gif", "ppm", "tiff", "webp")


def _encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_PIXELS).save(buffer, kind)
    return buffer.getvalue()


_ENCODED = {kind: _encoded(kind) for kind in _FORMATS}


@pytest.mark.parametrize("kind", _FORMATS)
def test_formats_that_are_wanted_whatever_the_ending_says(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(_ENCODED[kind])
    assert header(path) == Header(7, 9, grey=False)
    expected = Image.open(path).convert("RGB")
    assert np.array_equal(decode(path, 3, None), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["eps", "pdf", "sgi", "tga", "pcx", "ico", "icns", "xbm"])
def test_no_other_decoder_is_asked(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    picture = Image.fromarray(_PIXELS[..., 0]).convert("1" if kind == "xbm" else "RGB")
    picture.save(path, kind)
    with pytest.raises(UnusableImage, match="none of PNG"):
        header(path)


def test_images_are_opened_in_one_place() -> None:
    packages = ("fedkn", "clients", "server", "simulations")
    texts = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for package in packages
        for path in (ROOT / package).rglob("*.py")
    }
    naming = {name for name, text in texts.items() if re.search(r"\bPIL\b|imread", text)}
    # One makes pictures, one has the name in a list.
    others = {"simulations/report/chart.py", "server/deployment/own_code.py"}
    assert naming == {"fedkn/data/decoding.py"} | others
    assert not any(re.search(r"Image\.open|imread", texts[name]) for name in others)


_DEEP = np.random.default_rng(1).integers(0, 65536, (9, 7)).astype(np.uint16)


def _pgm(pixels: np.ndarray, kind: bytes) -> bytes:
    return b"%s 7 9 65535\n" % kind + pixels.astype(">u2").tobytes()


def _png_of_16_bits_in_colour(pixels: np.ndarray) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    head = struct.pack(">IIBBBBB", 7, 9, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
def test_grey_images_of_16_bits_keep_every_value(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"deep.{kind}"
    if kind == "pgm":
        path.write_bytes(_pgm(_DEEP, b"P5"))
    else:
        Image.fromarray(_DEEP).save(path)
    found = header(path)
    assert found == Header(7, 9, True, np.dtype(np.int32))
    assert np.array_equal(decode(path, 1, None, found.dtype)[0], _DEEP)
    # Resized: the mean of what it covers, to a value.
    (wide,) = decode(path, 1, (1, 1), found.dtype).flatten()
    assert _DEEP.min() < wide < _DEEP.max()


def test_floating_point_images_keep_every_value(tmp_path: Path) -> None:
    path, pixels = tmp_path / "deep.tiff", (_DEEP / 7).astype(np.float32)
    Image.fromarray(pixels).save(path)
    found = header(path)
    assert found == Header(7, 9, True, np.dtype(np.float32))
    assert np.array_equal(decode(path, 1, None, found.dtype)[0], pixels)
    pixels[3, 2] = np.nan
    Image.fromarray(pixels).save(path)
    with pytest.raises(UnusableImage, match="NaN"):
        decode(path, 1, None, found.dtype)


@pytest.mark.parametrize("kind", ["png", "ppm"])
def test_of_colour_in_16_bits_nothing_is_cut_off_in_silence(kind: str, tmp_path: Path) -> None:
    path, pixels = tmp_path / f"deep.{kind}", np.repeat(_DEEP, 3, axis=1)
    path.write_bytes(_png_of_16_bits_in_colour(pixels) if kind == "png" else _pgm(pixels, b"P6"))
    # Pillow says nothing of it.
    assert Image.open(path).mode == "RGB"
    with pytest.raises(UnusableImage, match="more than 8 bits a channel in colour"):
        header(path)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(_FORMATS),
    # Most of what a decoder can stumble over stands at the beginning.
    places=st.lists(st.integers(0, 60) | st.integers(0, 1000), min_size=1, max_size=6),
    bits=st.integers(1, 255),
    keep=st.integers(0, 1000),
)
def test_damaged_bytes_raise_nothing_else(
    kind: str, places: list[int], bits: int, keep: int, tmp_path: Path
) -> None:
    content = bytearray(_ENCODED[kind])
    for place in places:
        content[place % len(content)] ^= bits
    path = tmp_path / "damaged.png"
    path.write_bytes(content[:keep] if keep < len(content) else content)
    try:
        found = header(path)
        pixels = decode(path, 3, (5, 4))
    except UnusableImage:
        return
    assert found.width * found.height <= 89_478_485
    assert pixels.shape == (3, 4, 5)
