"""The batches of several clients' steps, side by side: what `train_stacked` takes its steps on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkn.layers.kernel.dropout import keys_of
from fedkn.seeds import derive, torch_generator
from fedkn.training.batches import BatchPlan
from fedkn.training.inputs import Inputs
from fedkn.training.local import LocalTask

__all__ = ["Batch", "StackedBatches", "StackedClient"]


@dataclass(frozen=True, eq=False)
class StackedClient:
    """One of the clients: its task, the tensors it starts from, and its examples.

    Tensors of the model that are not in `received` start as initialised. `examples` (N, C, H, W)
    and `targets` (N, ...) are on the model's device.
    """

    task: LocalTask
    received: Mapping[str, Tensor]
    examples: Tensor
    targets: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's batches of K clients, B examples each.

    Attributes:
        x: what the model is given, (K, B, C, H, W), float32. targets: (K, B, ...).
        weights: (K, B), 1 for examples, 0 for what fills up a shorter batch.
        keys: (K, calls), of the dropout calls of each client's forward pass.
    """

    x: Tensor
    targets: Tensor
    weights: Tensor
    keys: Tensor


class StackedBatches:
    """All steps of a round for clients in the order of their steps, the most first.

    Rows, weights and keys of all steps are worked out at once: a step only takes its own.

    Args:
        clients, plans: each client's examples, and which of them its steps take.
        inputs: scales and augments.
        calls: how many dropout calls a forward pass makes.
    """

    def __init__(
        self,
        clients: Sequence[StackedClient],
        plans: Sequence[BatchPlan],
        inputs: Inputs,
        calls: int,
    ) -> None:
        self._tasks = [client.task for client in clients]
        self.inputs = inputs
        self._examples = torch.cat([client.examples for client in clients])
        self._targets = torch.cat([client.targets for client in clients])
        self._steps = [len(plan.steps) for plan in plans]
        sizes = [np.array([len(b) for b in plan.batches], dtype=np.int64) for plan in plans]
        steps, width = self._steps[0], max((int(s.max()) for s in sizes if len(s)), default=0)
        shape = (steps, len(clients), width)
        # What fills up is an example of the batch itself, or of the first client, without weight.
        rows, self._sizes = np.zeros(shape, np.int64), np.zeros(shape[:2], np.int64)
        starts = np.cumsum([0, *(len(client.targets) for client in clients)])
        for place, (plan, counts) in enumerate(zip(plans, sizes, strict=True)):
            if not len(counts):
                continue
            self._sizes[: len(counts), place] = counts
            first = np.cumsum(counts) - counts
            slots = np.arange(width)
            slots = first[:, None] + np.where(slots < counts[:, None], slots, 0)
            chosen = torch.cat(plan.batches).numpy()
            rows[: len(counts), place] = chosen[slots] + starts[place]
        device = self._targets.device
        weights = np.arange(width) < self._sizes[:, :, None]
        self._rows = torch.from_numpy(rows).to(device)
        self.weights = torch.from_numpy(weights.astype(np.float32)).to(device)
        self.keys = keys_of(torch.from_numpy(self._seeds("dropout")).to(device), calls)

    def __len__(self) -> int:
        """How many steps the client with the most of them takes."""
        return self._steps[0]

    def active(self, step: int) -> int:
        """Return how many clients have that step: the first so many."""
        return sum(own > step for own in self._steps)

    def one_by_one(self) -> Iterator[Batch]:
        """Yield step after step, of the clients that have it, no wider than its longest batch."""
        for step in range(len(self)):
            clients = self.active(step)
            width = int(self._sizes[step, :clients].max())
            examples, targets = self._taken(step, step + 1, clients, width)
            x = self.inputs(examples.flatten(0, 2)).contiguous()
            yield Batch(
                x.view(clients, width, *x.shape[1:]),
                targets[0],
                self.weights[step, :clients, :width],
                self.keys[step, :clients],
            )

    def taken(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return examples (S, K, B, C, H, W), augmented, and targets (S, K, B, ...) of some steps.

        Of all clients: those without such a step have examples of no weight.
        """
        return self._taken(begin, end, *self._rows.shape[1:])

    def _taken(self, begin: int, end: int, clients: int, width: int) -> tuple[Tensor, Tensor]:
        rows = self._rows[begin:end, :clients, :width]
        places = rows.flatten()
        examples, targets = self._examples[places], self._targets[places]
        if self.inputs.augments:

            def augmented(some: Tensor) -> Tensor:
                return self._augmented(some, begin, end, clients, width)

            examples = augmented(examples)
            targets = self._tasks[0].goal.moved(targets, augmented)
        return (
            examples.view(*rows.shape, *examples.shape[1:]),
            targets.view(*rows.shape, *targets.shape[1:]),
        )

    def _augmented(self, some: Tensor, begin: int, end: int, clients: int, width: int) -> Tensor:
        # Drawn for the true batch: what fills it up must not change the draws.
        places = [(step, client) for step in range(begin, end) for client in range(clients)]
        true = torch.from_numpy(self._sizes[begin:end, :clients].flatten())
        own = (torch.arange(width) < true[:, None]).flatten().to(some.device)
        generators = (
            torch_generator(t.seed, "augment", t.round_, t.client, step)
            for step, client in places
            for t in (self._tasks[client],)
        )
        some[own] = self.inputs.augmented_pieces(some[own], true.tolist(), generators)
        return some

    def _seeds(self, purpose: str) -> np.ndarray:
        seeds = np.zeros((len(self), len(self._tasks)), np.int64)
        for place, (task, steps) in enumerate(zip(self._tasks, self._steps, strict=True)):
            own = (task.seed, purpose, task.round_, task.client)
            seeds[:steps, place] = [derive(*own, step) for step in range(steps)]
        return seeds
