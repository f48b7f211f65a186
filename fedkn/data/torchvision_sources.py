"""Sources that torchvision knows how to read and to download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkn.data.examples import Examples, Source
from fedkn.data.vision import import_torchvision
from fedkn.errors import UserError

__all__ = ["TORCHVISION_SOURCES", "load_torchvision"]


@dataclass(frozen=True)
class _Recipe:
    dataset: str
    folder: str
    pixels: Callable[[Any], Tensor]
    arguments: Mapping[str, str] = field(default_factory=dict)


def _grey(images: Tensor) -> Tensor:
    return images.unsqueeze(1)


def _upright(images: Tensor) -> Tensor:
    # EMNIST's files hold each character mirrored along its diagonal.
    return images.unsqueeze(1).transpose(2, 3).contiguous()


def _colour(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


_RECIPES: Mapping[str, _Recipe] = {
    "mnist": _Recipe("MNIST", "MNIST/raw", _grey),
    "fashion_mnist": _Recipe("FashionMNIST", "FashionMNIST/raw", _grey),
    "emnist": _Recipe("EMNIST", "EMNIST/raw", _upright, {"split": "balanced"}),
    "cifar10": _Recipe("CIFAR10", "cifar-10-batches-py", _colour),
    "cifar100": _Recipe("CIFAR100", "cifar-100-python", _colour),
}
TORCHVISION_SOURCES: tuple[str, ...] = tuple(_RECIPES)


def load_torchvision(name: str, root: Path | None, download: bool) -> Source:
    """Return the source `name` of `TORCHVISION_SOURCES`, read from `root` (EMNIST: balanced).

    `root` is torchvision's: it holds ``MNIST/raw/``, ``cifar-10-batches-py/`` and so on. With
    `download`, what is missing there is fetched first.

    Raises
    ------
    UserError
        torchvision is not installed, `root` is not given, or the files are missing or damaged.
    """
    recipe = _RECIPES[name]
    if root is None:
        raise UserError(
            f"source '{name}' needs a folder: set data.root (--root DIR), "
            "and data.download=true (--download) to fetch the data into it"
        )
    import_torchvision()
    return Source(
        name,
        _part(name, recipe, root, download, train=True),
        _part(name, recipe, root, download, train=False),
    )


def _part(name: str, recipe: _Recipe, root: Path, download: bool, *, train: bool) -> Examples:
    dataset_class = getattr(import_torchvision().datasets, recipe.dataset)
    try:
        dataset = dataset_class(root, train=train, download=download, **recipe.arguments)
        return Examples(
            recipe.pixels(dataset.data),
            torch.as_tensor(dataset.targets, dtype=torch.int64),
            tuple(dataset.classes),
        )
    # What torchvision raises on a damaged file is anything from AssertionError to UnpicklingError.
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise _unreadable(name, root, recipe, download, why) from error


def _unreadable(name: str, root: Path, recipe: _Recipe, download: bool, why: str) -> UserError:
    folder = root / recipe.folder
    if download:
        return UserError(f"cannot download or read '{name}' in {folder}: {why}")
    if "not found" in why:
        return UserError(
            f"no intact '{name}' data in {folder}: point data.root (--root) at the folder that "
            f"holds {recipe.folder}, or set data.download=true (--download) to fetch it"
        )
    return UserError(
        f"cannot read '{name}' in {folder}: {why}; "
        "delete that folder and fetch it again with data.download=true (--download)"
    )
