"""What whoever trains a model must know of an experiment's images, without having any of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedkn.data.images import ImageData
from fedkn.errors import UserError

__all__ = ["DataSummary"]


@dataclass(frozen=True)
class DataSummary:
    """Names of classes, shape of an image, and the figures of ``standardized`` scaling.

    Pixels are uint8 in every source, so no dtype need be told.

    Attributes:
        classes: in the order of the labels. shape: channels, height and width.
        mean, deviation: of every channel of the training images, of pixels in [0, 1]; empty where
            the experiment's scaling does not use them.
    """

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    def conformed(self, own: ImageData) -> ImageData:
        """Return the images `own` with labels in the order of these classes, matched by name.

        `own` may lack classes.

        Raises:
            UserError: images of another shape, or classes that are not among these, naming both.
        """
        strange = [name for name in own.classes if name not in self.classes]
        if strange:
            raise UserError(
                f"has classes that the experiment lacks: {_listed(strange)}. The experiment's are "
                f"{_listed(self.classes)}; those here are {_listed(own.classes)}: name them as the "
                "experiment does (folders, or the array 'classes' of an .npz)"
            )
        channels, height, width = self.shape
        if own.in_channels != channels:
            raise UserError(f"has {own.in_channels} channel(s), but the experiment {channels}")
        if own.image_size != (height, width):
            ours = "x".join(map(str, own.image_size))
            raise UserError(
                f"has images of {ours} pixels, but the experiment of {height}x{width}: resize them"
            )
        if own.classes == self.classes:
            return own
        places = torch.tensor([self.classes.index(name) for name in own.classes])
        return ImageData(own.images, places[own.labels], self.classes)


def _listed(names: list[str] | tuple[str, ...]) -> str:
    more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


_SHOWN = 20
