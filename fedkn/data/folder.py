"""Images in folders, one folder for each class, or for each client and class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fedkn.data.decoded import load_decoded
from fedkn.data.decoding import decode_files, refusal, unusable
from fedkn.data.examples import Examples, Origins, Source
from fedkn.data.layout import ImageFile, Layout, read_client_layout, read_layout
from fedkn.data.split import limited, stratified_split
from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["load_client_folders", "load_image_folder"]

# Part of the cache's key: another way of decoding needs another number here.
_DECODING = "2"


def load_image_folder(
    root: Path | None,
    image_size: int,
    *,
    train_limit: int = 0,
    test_limit: int = 0,
    skip_damaged: bool = False,
) -> Source:
    """Return the images under `root`, decoded once into a memory-mapped cache file.

    Either ``root/train/<class>/*`` and ``root/test/<class>/*``, or ``root/<class>/*``, of which a
    stratified fifth is held out for tests by a draw that is always the same (`read_layout` says
    what is taken for what). The classes are the folders' names, sorted; those of test must be among
    those of train. Files are found at any depth in a class folder, by `EXTENSIONS`, but not hidden
    ones nor through symbolic links to folders inside a class. A class folder may be empty: a device
    may lack a class.

    Images are turned upright (EXIF) and become grey (1 channel) if all files that are used are
    grey, RGB (3) otherwise; transparency is dropped. A file whose size and time of change stay the
    same is taken to be unchanged.

    Parameters
    ----------
    image_size
        0: all images must have one size. S > 0: the central square of each is resized to S x S
        (bilinear with antialiasing).
    train_limit, test_limit
        Use so many images of each part (0: all), drawn by `limited`; no other file is opened.
    skip_damaged
        Leave out files that cannot be used, and say so in the source's notes, instead of refusing
        all. They are left out after the draws, which so are the same with and without them.

    Raises
    ------
    UserError
        No such folder, no images, one class only, different sizes without `image_size`, files
        that cannot be used, or no place to write the cache.
    """
    return _load("image_folder", root, image_size, (train_limit, test_limit), skip_damaged)


def load_client_folders(
    root: Path | None,
    image_size: int,
    *,
    train_limit: int = 0,
    test_limit: int = 0,
    skip_damaged: bool = False,
) -> Source:
    """Return the images of ``root/<client>/<class>/*``, with whose each is (`read_client_layout`).

    As `load_image_folder` in all else. The folders may as well be domains. Of every client a fifth
    is held out for tests.

    Raises
    ------
    UserError
        As `load_image_folder`.
    """
    return _load("client_folders", root, image_size, (train_limit, test_limit), skip_damaged)


def _load(
    name: str, root: Path | None, image_size: int, limits: tuple[int, int], skip_damaged: bool
) -> Source:
    if root is None:
        raise UserError(f"source '{name}' needs a folder: set data.root (--root DIR)")
    if not root.is_dir():
        raise UserError(
            f"no folder {printable(root)}: set data.root (--root DIR) to a folder of images"
        )
    if image_size < 0:
        raise UserError(f"data.image_size must be at least 0, got {image_size}")
    try:
        layout = _READERS[name](root)
    except OSError as error:
        raise UserError(f"cannot read {printable(error.filename)}: {error.strerror}") from error
    train, test = _divided(name, layout)
    strata = _client if layout.clients else _label
    train = _limited(train, strata, limits[0], "train")
    test = _limited(test, strata, limits[1], "test")
    files = [*train, *test]
    paths = [file.path for file in files]
    cached = load_decoded(
        root,
        _variant(name, image_size, *limits),
        _key(root, files, image_size, len(train)),
        lambda: decode_files(paths, image_size, skip_damaged=skip_damaged),
    )
    notes, left_out = layout.notes, cached.left_out
    if left_out:
        # From a cache that was written for somebody who left them out.
        if not skip_damaged:
            raise refusal(paths, left_out)
        notes = (*notes, f"left out: {unusable(paths, left_out)}")
    used = [index for index in range(len(files)) if index not in left_out]
    cut = sum(index < len(train) for index in used)
    labels = torch.tensor([files[index].label for index in used], dtype=torch.int64)
    data = Examples(cached.images, labels, layout.classes)
    if layout.clients:
        clients = torch.tensor([files[index].client for index in used], dtype=torch.int64)
        data = replace(data, origins=Origins(clients, layout.clients))
    return Source(
        name,
        data.between(0, cut),
        data.between(cut, len(used)),
        held_out=layout.test is None,
        notes=notes,
    )


_READERS = {"image_folder": read_layout, "client_folders": read_client_layout}


def _divided(name: str, layout: Layout) -> tuple[list[ImageFile], list[ImageFile]]:
    if layout.test is not None:
        return layout.train, layout.test
    strata = _strata(layout.train, _client if layout.clients else _label)
    kept, held = stratified_split(strata, 0.2, seed=0, purpose=f"test images of {name}")
    return [layout.train[index] for index in kept], [layout.train[index] for index in held]


def _limited(
    files: list[ImageFile], strata: Callable[[ImageFile], int], limit: int, part: str
) -> list[ImageFile]:
    chosen = limited(_strata(files, strata), limit, part)
    return files if chosen is None else [files[index] for index in chosen]


def _strata(files: Sequence[ImageFile], of: Callable[[ImageFile], int]) -> np.ndarray:
    return np.array([of(file) for file in files], dtype=np.int64)


def _label(file: ImageFile) -> int:
    return file.label


def _client(file: ImageFile) -> int:
    return file.client


def _variant(name: str, image_size: int, train_limit: int, test_limit: int) -> str:
    size = f"{image_size}px" if image_size else "native"
    # Beside the same images read as an image folder.
    size = f"clients+{size}" if name == "client_folders" else size
    return f"{size}+{train_limit}+{test_limit}" if train_limit or test_limit else size


def _key(root: Path, files: Sequence[ImageFile], image_size: int, train: int) -> str:
    digest = hashlib.blake2b(f"{_DECODING} {image_size} {train}".encode(), digest_size=16)
    prefix = len(os.fsencode(root))
    for file in files:
        path = os.fsencode(file.path)[prefix:]
        digest.update(b"\0%s\0%d\0%d" % (path, file.size, file.modified))
    return digest.hexdigest()
