"""Image files from the command line, as the pixels that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkn.data.decoding import EXTENSIONS, UnusableImage, decode, header
from fedkn.data.layout import image_files
from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["ImageFile", "find_images", "read_image", "read_images"]


@dataclass(frozen=True, eq=False)
class ImageFile:
    """An image as a model takes it: uint8 (C, H, W).

    `resized_from` is its own (width, height) where that is not the model's, else None.
    """

    path: Path
    pixels: Tensor
    resized_from: tuple[int, int] | None


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the files among `paths` and the image files in the folders among them, at any depth.

    In folders hidden files are passed over, and all without an ending of image files. Raises
    UserError for a folder without images, or one that cannot be read.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            # Whether it is there and what it holds shows when it is read.
            found.append(path)
            continue
        try:
            inside = [Path(name) for name in image_files(path)]
        except OSError as error:
            raise UserError(
                f"cannot read '{printable(error.filename)}': {error.strerror}"
            ) from None
        if not inside:
            raise UserError(
                f"no images in folder '{printable(path)}' (looked for "
                f"{', '.join(sorted(EXTENSIONS))})"
            )
        found += inside
    return found


def read_images(
    paths: Sequence[Path], channels: int, height: int, width: int
) -> tuple[list[ImageFile], dict[Path, str]]:
    """Return the images that can be read, and of the other files why they cannot.

    Raises UserError where none can be, or the model takes what no image file has.
    """
    files: list[ImageFile] = []
    failed: dict[Path, str] = {}
    for path in paths:
        try:
            files.append(_image(path, channels, height, width))
        except UnusableImage as error:
            failed[path] = str(error)
    if not files:
        path, why = next(iter(failed.items()))
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(
            f"no image can be used: '{printable(path)}' {why}{more}; give image files that open in "
            "a viewer"
        )
    return files, failed


def read_image(path: Path, channels: int, height: int, width: int) -> ImageFile:
    """Read a file as image folders are read: turned upright (EXIF), then grey or RGB.

    Of another size, the central part of the model's proportions is resized (bilinear with
    antialiasing). Raises UserError if it cannot be used.
    """
    (file,), _ = read_images([path], channels, height, width)
    return file


def _image(path: Path, channels: int, height: int, width: int) -> ImageFile:
    if channels not in (1, 3):
        raise UserError(f"the model takes images of {channels} channels; image files have 1 or 3")
    found = header(path)
    if found.dtype != np.uint8:
        raise UnusableImage("has more than 8 bits a channel, and the model was trained on 8")
    size = (found.width, found.height)
    pixels = decode(path, channels, (width, height))
    tensor = torch.from_numpy(np.ascontiguousarray(pixels))
    return ImageFile(path, tensor, None if size == (width, height) else size)
