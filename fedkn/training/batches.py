"""Which examples a client trains on in a round, in which order: a pure function of the seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkn.config import TrainConfig
from fedkn.seeds import torch_generator

__all__ = ["BatchPlan", "plan_batches"]


@dataclass(frozen=True)
class BatchPlan:
    """The local batches of one client in one round, and what was left out of them.

    Attributes:
        steps: for each local step, which is one of the optimizer's, its local batches: int64 index
            tensors into the client's examples.
        examples: examples trained on, counted once for each time (sum of the batch sizes).
        skipped_batches: batches too small for the normalizer to train on.
        skipped_examples: examples in those batches.
    """

    steps: tuple[tuple[Tensor, ...], ...]
    examples: int
    skipped_batches: int
    skipped_examples: int

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """The local batches of all steps, in their order."""
        return tuple(batch for step in self.steps for batch in step)


def plan_batches(
    size: int,
    train: TrainConfig,
    minimum_batch: int,
    *,
    seed: int,
    round_: int,
    client: int,
    largest_batch: int = 0,
) -> BatchPlan:
    """Plan the local batches of `client`, who holds `size` examples, in round `round_`.

    Every local epoch is a fresh permutation of the examples, cut into the examples of a step,
    ``train.batch_size * train.accumulate`` of them, and these into batches of
    ``train.batch_size``; the last step of an epoch holds the remainder. A batch smaller than
    `minimum_batch` (the normalizer's declaration) is skipped and counted, any other is trained
    on. ``train.local_steps`` caps the number of steps.

    With `largest_batch` every larger batch is divided into as few and as equal batches as keep to
    it: other batches, the same examples in every step.
    """
    steps: list[tuple[Tensor, ...]] = []
    examples = skipped = skipped_examples = 0
    for epoch in range(train.local_epochs):
        if train.local_steps and len(steps) >= train.local_steps:
            break
        generator = torch_generator(seed, "shuffle", round_, client, epoch)
        sizes = list(_sizes(size, train, largest_batch))
        # One call for all: to cut each step by itself takes longer than to draw the order.
        order = torch.randperm(size, generator=generator)
        parts = iter(torch.split(order, [each for step in sizes for each in step]))
        for of_step in sizes:
            if train.local_steps and len(steps) >= train.local_steps:
                break
            step: list[Tensor] = []
            for each in of_step:
                part = next(parts)
                if each < minimum_batch:
                    skipped += 1
                    skipped_examples += each
                else:
                    step.append(part)
                    examples += each
            if step:
                steps.append(tuple(step))
    return BatchPlan(tuple(steps), examples, skipped, skipped_examples)


def _sizes(size: int, train: TrainConfig, largest: int) -> Iterator[list[int]]:
    """Yield for each step of an epoch over `size` examples the sizes of its batches."""
    for begin in range(0, size, train.batch_size * train.accumulate):
        left = min(train.batch_size * train.accumulate, size - begin)
        step: list[int] = []
        while left:
            batch = min(train.batch_size, left)
            pieces = -(-batch // largest) if largest else 1
            step += [batch // pieces + (piece < batch % pieces) for piece in range(pieces)]
            left -= batch
        yield step
