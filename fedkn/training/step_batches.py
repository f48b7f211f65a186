"""The local batches of a client's steps as the model is given them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fedkn.seeds import derive, torch_generator
from fedkn.training.inputs import Inputs

__all__ = ["LocalBatch", "Moved", "StepChunk", "step_batches", "step_chunks", "steps_of"]

Moved = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""How targets follow where augmentation moves inputs: `fedkn.tasks.Task.moved`."""


class LocalBatch(NamedTuple):
    """What the model is given (n, C, H, W), float32, targets (n, ...), the seed of the dropout."""

    x: Tensor
    targets: Tensor
    dropout: int


@dataclass(frozen=True, eq=False)
class StepChunk:
    """The batches of some of a client's steps, one after the other.

    Attributes:
        x, targets: of all of them, (n, C, H, W), float32, and (n, ...).
        sizes: for every step the sizes of its batches. rows: where its examples begin.
        first: the number of the first step in the client's round.
        draws: seed, round and client.
    """

    x: Tensor
    targets: Tensor
    sizes: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    first: int
    draws: tuple[int, int, int]

    def step(self, number: int) -> list[LocalBatch]:
        """Return the batches of the chunk's step `number`, from 0."""
        sizes, row = self.sizes[number], self.rows[number]
        end = row + sum(sizes)
        x = torch.split(self.x[row:end], list(sizes))
        targets = torch.split(self.targets[row:end], list(sizes))
        seeds = (self.seed(number, part) for part in range(len(sizes)))
        return list(map(LocalBatch, x, targets, seeds))

    def seed(self, number: int, part: int) -> int:
        """Return the seed of the dropout of batch `part` of the chunk's step `number`, from 0."""
        seed, *place = self.draws
        return derive(seed, "dropout", *place, self.first + number, *((part,) if part else ()))


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
    """Return the local batches of one step after another; arguments as `step_chunks`."""
    return steps_of(step_chunks(examples, targets, steps, inputs, draws, moved=moved, first=first))


def steps_of(chunks: Iterable[StepChunk]) -> Iterator[list[LocalBatch]]:
    """Yield the local batches of one step after another."""
    for chunk in chunks:
        for number in range(len(chunk.sizes)):
            yield chunk.step(number)


def step_chunks(
    examples: Tensor,
    targets: Tensor,
    steps: Sequence[Sequence[Tensor]],
    inputs: Inputs,
    draws: tuple[int, int, int],
    *,
    moved: Moved,
    first: int = 0,
) -> Iterator[StepChunk]:
    """Yield the local batches of the steps, of several at once.

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
        sizes = tuple(tuple(map(len, step)) for step in steps[begin:end])
        rows = tuple(accumulate(map(sum, sizes[:-1]), initial=0))
        yield StepChunk(inputs(taken), wanted, sizes, rows, first + begin, draws)


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
