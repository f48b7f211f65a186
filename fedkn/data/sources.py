"""Sources by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedkn.data.arrays import load_arrays
from fedkn.data.digits import load_digits
from fedkn.data.digits_domains import load_digits_domains
from fedkn.data.examples import Source
from fedkn.data.folder import load_client_folders, load_image_folder
from fedkn.data.huggingface import load_huggingface
from fedkn.data.own import load_own_source
from fedkn.data.torchvision_sources import TORCHVISION_SOURCES, load_torchvision
from fedkn.errors import UserError
from fedkn.references import find
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
    options: Mapping[str, Any] | None = None,
    train_limit: int = 0,
    test_limit: int = 0,
    skip_damaged: bool = False,
) -> Source:
    """Return the source `name`; its notes are logged as warnings.

    Parameters
    ----------
    name
        One of `names()`, ``package.module:function`` of somebody's own, or what a package has
        registered (`fedkn.references`).
    root
        Folder that holds the data, or for `arrays` the .npz file (None or "": not given);
        `digits` needs none.
    download
        Fetch what is missing in `root`; for the sources that torchvision can download.
    image_size
        Resize the images of a folder to this height and width (0: as they are).
    options
        Keyword arguments of a source of somebody's own, or what `huggingface` takes.
    train_limit, test_limit
        Use so many training and test examples, drawn by `fedkn.data.split.limited` (0: all).
    skip_damaged
        Leave out files of a folder of images that cannot be used, instead of refusing all.

    Raises
    ------
    UserError
        The name is unknown, or the data are missing, damaged or unfit; the message says what to
        change.
    """
    found = find("source", name, _LOADERS)
    shown, own = printable(name, 120), name not in _LOADERS
    if image_size and name not in _RESIZED:
        raise UserError(f"data.image_size is for images in files, not for '{shown}': leave 0")
    if options and not own and name not in _TOLD:
        raise UserError(f"source '{shown}' takes no options: leave data.options out")
    where = Path(root) if root else None
    asked = _Asked(
        where, download, image_size, train_limit, test_limit, skip_damaged, options or {}
    )
    source = asked.of(load_own_source(name, found, where, asked.options)) if own else found(asked)
    source = replace(source, notes=(*source.notes, *_missing_classes(source), *_turned(source)))
    for note in source.notes:
        _LOG.warning("source '%s': %s", shown, note)
    return source


def _missing_classes(source: Source) -> tuple[str, ...]:
    targets = source.train.targets
    if targets.dtype != torch.int64 or not source.num_classes:
        return ()
    known = targets[(targets >= 0) & (targets < source.num_classes)]
    counts = torch.bincount(known, minlength=source.num_classes)
    missing = [source.train.classes[label] for label in (counts == 0).nonzero().flatten().tolist()]
    if not missing:
        return ()
    shown = ", ".join(printable(name, 60) for name in missing[:_NAMED])
    more = f", and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return (
        f"no training example of {len(missing)} of {source.num_classes} classes: {shown}{more}",
    )


def _turned(source: Source) -> tuple[str, ...]:
    """Say of images and volumes that look as if their last axis were the channels."""
    shape = source.shape
    if len(shape) not in (3, 4) or shape[-1] not in _COLOURS or min(shape[:-1]) <= shape[-1]:
        return ()
    order = ", ".join(map(str, (0, len(shape), *range(1, len(shape)))))
    sides = "x".join(map(str, shape[1:]))
    return (
        f"inputs are taken as (N, C, {_SIDES[len(shape)]}), {shape[0]} channels of {sides}: if the "
        f"{shape[-1]} on the last axis are the channels, give x.transpose({order}) of an array, "
        f"x.permute({order}) of a tensor",
    )


_COLOURS = (1, 3, 4)
_SIDES = {3: "H, W", 4: "D, H, W"}


@dataclass(frozen=True)
class _Asked:
    root: Path | None
    download: bool
    image_size: int
    train_limit: int
    test_limit: int
    skip_damaged: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    def of(self, source: Source) -> Source:
        """Return `source` with as many examples as are asked for."""
        return replace(
            source,
            train=source.train.limited(self.train_limit, "train"),
            test=source.test.limited(self.test_limit, "test"),
        )


def _digits(asked: _Asked) -> Source:
    return asked.of(load_digits())


def _torchvision(name: str, asked: _Asked) -> Source:
    return asked.of(load_torchvision(name, asked.root, asked.download))


def _digits_domains(asked: _Asked) -> Source:
    return asked.of(load_digits_domains())


def _image_folder(asked: _Asked, load: Callable[..., Source]) -> Source:
    return load(
        asked.root,
        asked.image_size,
        train_limit=asked.train_limit,
        test_limit=asked.test_limit,
        skip_damaged=asked.skip_damaged,
    )


def _huggingface(asked: _Asked) -> Source:
    return asked.of(
        load_huggingface(
            asked.root, asked.options, asked.image_size, skip_damaged=asked.skip_damaged
        )
    )


def _arrays(asked: _Asked) -> Source:
    return asked.of(load_arrays(asked.root))


_LOADERS: Mapping[str, Callable[[_Asked], Source]] = {
    "digits": _digits,
    "digits_domains": _digits_domains,
    **{name: partial(_torchvision, name) for name in TORCHVISION_SOURCES},
    "image_folder": partial(_image_folder, load=load_image_folder),
    "client_folders": partial(_image_folder, load=load_client_folders),
    "arrays": _arrays,
    "huggingface": _huggingface,
}
_RESIZED = ("image_folder", "client_folders", "huggingface")
_TOLD = ("huggingface",)
