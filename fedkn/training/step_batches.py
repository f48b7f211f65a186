"""The local batches of a client's steps as the model is given them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedkn.seeds import derive, torch_generator
from fedkn.training.inputs import Inputs

__all__ = ["LocalBatch", "Moved", "step_batches"]

Moved = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""How targets follow where augmentation moves inputs: `fedkn.tasks.Task.moved`."""


class LocalBatch(NamedTuple):
    """What the model is given (n, C, H, W), float32, targets (n, ...), the seed of the dropout."""

    x: Tensor
    targets: Tensor
    dropout: int


def step_batches(
    examples: Tensor,
    targets: Tensor,
    steps: Sequence[Sequence[Tensor]],
    inputs: Inputs,
    draws: tuple[int, int, int],
    *,
    moved: Moved,
    first: int = 0,
) -> Iterator[list[LocalBatch]]:
    """Yield the local batches of one step after another.

    Augmentation is drawn for all examples of a step at once, so that it is the same however they
    are divided; dropout for each batch. Examples of several steps are scaled together, because for
    tiny batches the calls cost more than the work.

    Args:
        examples, targets: the client's, (N, C, H, W) and (N, ...).
        steps: for every step its batches, each the indices of its examples, int64; none is empty.
        draws: seed, round and client.
        moved: lets targets follow augmentation.
        first: the number of the first of `steps` in the client's round.
    """
    seed, *place = draws
    each = examples.shape[1:].numel()
    for begin, end in _together(steps, max(1, _NUMBERS_AT_ONCE // each)):
        batches = [batch for step in steps[begin:end] for batch in step]
        where = torch.cat(batches).to(examples.device)
        taken, wanted = examples.index_select(0, where), targets.index_select(0, where)
        if inputs.augments:
            pieces = [sum(map(len, step)) for step in steps[begin:end]]
            numbers = range(first + begin, first + end)

            def augmented(
                some: Tensor, pieces: list[int] = pieces, numbers: range = numbers
            ) -> Tensor:
                generators = (torch_generator(seed, "augment", *place, step) for step in numbers)
                return inputs.augmented_pieces(some, pieces, generators)

            taken, wanted = augmented(taken), moved(wanted, augmented)
        sizes = [len(batch) for batch in batches]
        scaled = iter(torch.split(inputs(taken), sizes))
        answers = iter(torch.split(wanted, sizes))
        for number in range(begin, end):
            yield [
                LocalBatch(
                    next(scaled),
                    next(answers),
                    derive(seed, "dropout", *place, first + number, *((part,) if part else ())),
                )
                for part in range(len(steps[number]))
            ]


_NUMBERS_AT_ONCE = 1 << 18
"""Numbers scaled at once: a mebibyte of float32, which a core's cache still holds."""


def _together(steps: Sequence[Sequence[Tensor]], most: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of runs of steps that hold at most `most` examples, or are one step."""
    begin = held = 0
    for number, step in enumerate(steps):
        size = sum(map(len, step))
        if number > begin and held + size > most:
            yield begin, number
            begin, held = number, 0
        held += size
    if begin < len(steps):
        yield begin, len(steps)
