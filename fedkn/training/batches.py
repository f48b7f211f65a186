"""Which examples a client trains on in a round, in which order: a pure function of the seeds."""

from __future__ import annotations

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
    skipped = skipped_examples = 0
    for epoch in range(train.local_epochs):
        if train.local_steps and len(steps) >= train.local_steps:
            break
        generator = torch_generator(seed, "shuffle", round_, client, epoch)
        order = torch.randperm(size, generator=generator)
        for together in torch.split(order, train.batch_size * train.accumulate):
            if train.local_steps and len(steps) >= train.local_steps:
                break
            step: list[Tensor] = []
            for batch in torch.split(together, train.batch_size):
                for part in _divided(batch, largest_batch):
                    if len(part) < minimum_batch:
                        skipped += 1
                        skipped_examples += len(part)
                    else:
                        step.append(part)
            if step:
                steps.append(tuple(step))
    examples = sum(len(batch) for step in steps for batch in step)
    return BatchPlan(tuple(steps), examples, skipped, skipped_examples)


def _divided(batch: Tensor, largest: int) -> tuple[Tensor, ...]:
    if not largest or len(batch) <= largest:
        return (batch,)
    return torch.tensor_split(batch, -(-len(batch) // largest))
