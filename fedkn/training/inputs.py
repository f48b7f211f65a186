"""From a batch of a source's inputs to what the model sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkn.data.augmentation import augment, augment_pieces, scale

__all__ = ["Inputs"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Scales batches of images, and augments them in training.

    Attributes:
        scaling: ``unit``, ``centered``, ``standardized`` or ``none``.
        mean, deviation: per channel (C,), for ``standardized``: of uint8 pixels in [0, 1], float32;
            of other inputs as they are, float64.
        flip: left-right at random; crop_padding: random crop after padding by so many pixels.
        memory_format: how the result is laid out.
    """

    scaling: str
    mean: Tensor | None = None
    deviation: Tensor | None = None
    flip: bool = False
    crop_padding: int = 0
    memory_format: torch.memory_format = torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """Return inputs (N, C, ...) as scaled float32, not augmented."""
        scaled = scale(images, self.scaling, self.mean, self.deviation)
        if scaled.ndim != 4:
            return scaled.contiguous()  # a layout of channels is one of images
        return scaled.contiguous(memory_format=self.memory_format)

    @property
    def augments(self) -> bool:
        """Whether training batches are augmented, which takes a generator."""
        return self.flip or self.crop_padding > 0

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return `images` augmented with `generator`'s draws, not scaled."""
        return augment(images, generator, flip=self.flip, crop_padding=self.crop_padding)

    def augmented_pieces(
        self, images: Tensor, sizes: Sequence[int], generators: Iterable[torch.Generator]
    ) -> Tensor:
        """Return `images` as `augmented` does each piece, `sizes` long, by its generator."""
        return augment_pieces(
            images, sizes, generators, flip=self.flip, crop_padding=self.crop_padding
        )
