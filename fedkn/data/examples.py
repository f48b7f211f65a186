"""What every source becomes: labelled uint8 images in memory or memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fedkn.data.split import limited
from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["Examples", "Source"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled images of one size.

    Attributes
    ----------
    inputs
        uint8 tensor (N, C, H, W), values 0..255; may be backed by a memory-mapped file.
    targets
        int64 tensor (N,), indices into `classes`.
    classes
        Names of the classes, whether or not these images contain each of them.

    Raises
    ------
    UserError
        A dtype, a shape or a label does not fit this description; a class has no name, a name
        that is no text, or another one's.
    """

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_classes(self.classes)
        _check_images(self.inputs)
        _check_labels(self.targets, len(self.inputs), len(self.classes))

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.inputs.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return (self.inputs.shape[2], self.inputs.shape[3])

    def select(self, indices: Tensor | np.ndarray) -> Self:
        """Return a copy of the images at the integer `indices` (M,), in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return type(self)(
            self.inputs[chosen.to(self.inputs.device)],
            self.targets[chosen.to(self.targets.device)],
            self.classes,
        )

    def limited(self, limit: int, part: str) -> Self:
        """Return `limit` of the images (0: all), chosen by `fedkn.data.split.limited`."""
        chosen = limited(self.targets, limit, part)
        return self if chosen is None else self.select(chosen)

    def to(self, device: torch.device | str) -> Self:
        """Return the same data on `device`."""
        return type(self)(self.inputs.to(device), self.targets.to(device), self.classes)


@dataclass(frozen=True, eq=False)
class Source:
    """A data set: training images, which are partitioned among clients, and test images.

    Attributes
    ----------
    held_out
        Whether the test images are a part of what would otherwise be training images; False where
        whoever made the data set them apart.
    notes
        What was left out or passed over when it was loaded, in sentences that can be shown.

    Raises
    ------
    UserError
        A part is empty, there is only one class, or the two parts differ in classes, channels
        or size.
    """

    name: str
    train: Examples
    test: Examples
    held_out: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part, data in (("training", self.train), ("test", self.test)):
            if len(data) == 0:
                raise UserError(f"source '{self.name}' has no {part} images")
        if self.num_classes < 2:
            only = printable(", ".join(self.train.classes))
            raise UserError(
                f"source '{self.name}' has one class only ({only}): a classifier needs at least two"
            )
        if self.train.classes != self.test.classes:
            raise UserError(f"source '{self.name}': training and test classes differ")
        if self.train.inputs.shape[1:] != self.test.inputs.shape[1:]:
            raise UserError(
                f"source '{self.name}': training images are {_shape(self.train)} but test images "
                f"are {_shape(self.test)} (channels x height x width)"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.train.num_classes

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.train.in_channels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.train.image_size


def _check_classes(classes: tuple[str, ...]) -> None:
    known: dict[str, int] = {}
    for label, name in enumerate(classes):
        if not name.strip():
            raise UserError(f"class {label} has no name")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"the name of class {label}, '{printable(name)}', is no text: give it in Unicode"
            ) from None
        if name in known:
            raise UserError(
                f"classes {known[name]} and {label} are both called '{printable(name)}': give each "
                "a name of its own"
            )
        known[name] = label


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
        raise UserError(
            f"images must be a uint8 tensor (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )


def _check_labels(labels: Tensor, images: int, classes: int) -> None:
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise UserError(
            f"labels must be an int64 tensor (N,), got {labels.dtype} {tuple(labels.shape)}"
        )
    if len(labels) != images:
        raise UserError(f"{images} images but {len(labels)} labels")
    if images and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(
            f"labels must lie in 0..{classes - 1}, found {int(labels.min())}..{int(labels.max())}"
        )


def _shape(data: Examples) -> str:
    return "x".join(str(side) for side in data.inputs.shape[1:])
