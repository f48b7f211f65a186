"""The local batches of one step as the model is given them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedkn.seeds import derive, torch_generator
from fedkn.training.inputs import Inputs

__all__ = ["LocalBatch", "step_batches"]


class LocalBatch(NamedTuple):
    """Images (n, C, H, W), float32, their labels (n,), and the seed of the dropout."""

    images: Tensor
    labels: Tensor
    dropout: int


def step_batches(
    images: Tensor,
    labels: Tensor,
    chosen: Sequence[Tensor],
    inputs: Inputs,
    draws: tuple[int, int, int, int],
) -> Iterator[LocalBatch]:
    """Yield the local batches of a step.

    Augmentation is drawn for all examples of the step at once, so that it is the same however they
    are divided; dropout for each batch.

    Args:
        images, labels: the client's, uint8 (N, C, H, W) and int64 (N,).
        chosen: for every batch the indices of its examples, int64.
        draws: seed, round, client and step.
    """
    seed, *place = draws
    where = torch.cat(list(chosen)).to(images.device)
    pixels, answers = images[where], labels[where]
    if inputs.augments:
        pixels = inputs.augmented(pixels, torch_generator(seed, "augment", *place))
    sizes = [len(batch) for batch in chosen]
    parts = zip(torch.split(pixels, sizes), torch.split(answers, sizes), strict=True)
    for number, (some, own) in enumerate(parts):
        more = (number,) if number else ()
        yield LocalBatch(inputs(some), own, derive(seed, "dropout", *place, *more))
