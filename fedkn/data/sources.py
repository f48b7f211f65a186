"""Sources by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fedkn.data.arrays import load_arrays
from fedkn.data.digits import load_digits
from fedkn.data.examples import Source
from fedkn.data.folder import load_image_folder
from fedkn.data.torchvision_sources import TORCHVISION_SOURCES, load_torchvision
from fedkn.errors import UserError, unknown_name
from fedkn.text import printable

__all__ = ["load", "names"]

_NAMED = 10
_LOG = logging.getLogger("fedkn")


def names() -> tuple[str, ...]:
    """Return the names of the sources, the embedded one first."""
    return tuple(_LOADERS)


def load(
    name: str,
    root: str | Path | None = None,
    download: bool = False,
    image_size: int = 0,
    *,
    train_limit: int = 0,
    test_limit: int = 0,
    skip_damaged: bool = False,
) -> Source:
    """Return the source `name`, decoded into uint8 tensors; its notes are logged as warnings.

    Parameters
    ----------
    name
        One of `names()`.
    root
        Folder that holds the data, or for `arrays` the .npz file (None or "": not given);
        `digits` needs none.
    download
        Fetch what is missing in `root`; for the sources that torchvision can download.
    image_size
        Resize the images of `image_folder` to this height and width (0: as they are).
    train_limit, test_limit
        Use so many training and test images, drawn by `fedkn.data.split.limited` (0: all).
    skip_damaged
        Leave out files of `image_folder` that cannot be used, instead of refusing all.

    Raises
    ------
    UserError
        The name is unknown, or the data are missing, damaged or unfit; the message says what to
        change.
    """
    if name not in _LOADERS:
        raise unknown_name("source", name, _LOADERS)
    if image_size and name != "image_folder":
        raise UserError(f"data.image_size is for source 'image_folder', not for '{name}': leave 0")
    asked = _Asked(
        Path(root) if root else None, download, image_size, train_limit, test_limit, skip_damaged
    )
    source = _LOADERS[name](asked)
    source = replace(source, notes=(*source.notes, *_missing_classes(source)))
    for note in source.notes:
        _LOG.warning("source '%s': %s", name, note)
    return source


def _missing_classes(source: Source) -> tuple[str, ...]:
    counts = torch.bincount(source.train.targets, minlength=source.num_classes)
    missing = [source.train.classes[label] for label in (counts == 0).nonzero().flatten().tolist()]
    if not missing:
        return ()
    shown = ", ".join(printable(name, 60) for name in missing[:_NAMED])
    more = f", and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return (f"no training image of {len(missing)} of {source.num_classes} classes: {shown}{more}",)


@dataclass(frozen=True)
class _Asked:
    root: Path | None
    download: bool
    image_size: int
    train_limit: int
    test_limit: int
    skip_damaged: bool

    def of(self, source: Source) -> Source:
        """Return `source` with as many images as are asked for."""
        return replace(
            source,
            train=source.train.limited(self.train_limit, "train"),
            test=source.test.limited(self.test_limit, "test"),
        )


def _digits(asked: _Asked) -> Source:
    return asked.of(load_digits())


def _torchvision(name: str, asked: _Asked) -> Source:
    return asked.of(load_torchvision(name, asked.root, asked.download))


def _image_folder(asked: _Asked) -> Source:
    return load_image_folder(
        asked.root,
        asked.image_size,
        train_limit=asked.train_limit,
        test_limit=asked.test_limit,
        skip_damaged=asked.skip_damaged,
    )


def _arrays(asked: _Asked) -> Source:
    return asked.of(load_arrays(asked.root))


_LOADERS: Mapping[str, Callable[[_Asked], Source]] = {
    "digits": _digits,
    **{name: partial(_torchvision, name) for name in TORCHVISION_SOURCES},
    "image_folder": _image_folder,
    "arrays": _arrays,
}
