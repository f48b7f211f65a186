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

    Tensors of the model that are not in `received` start as initialised. `images` (N, C, H, W) are
    uint8, `labels` (N,) int64, both on the model's device.
    """

    task: LocalTask
    received: Mapping[str, Tensor]
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's batches of K clients, B examples each.

    Attributes:
        images: (K, B, C, H, W), float32. labels: (K, B), int64.
        weights: (K, B), 1 for examples, 0 for what fills up a shorter batch.
        keys: (K, calls), of the dropout calls of each client's forward pass.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    keys: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four of them."""
        return self.images, self.labels, self.weights, self.keys


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
        self._images = torch.cat([client.images for client in clients])
        self._labels = torch.cat([client.labels for client in clients])
        self._steps = [len(plan.steps) for plan in plans]
        sizes = [np.array([len(b) for b in plan.batches], dtype=np.int64) for plan in plans]
        steps, width = self._steps[0], max((int(s.max()) for s in sizes if len(s)), default=0)
        shape = (steps, len(clients), width)
        # What fills up is an example of the batch itself, or of the first client, without weight.
        rows, self._sizes = np.zeros(shape, np.int64), np.zeros(shape[:2], np.int64)
        starts = np.cumsum([0, *(len(client.labels) for client in clients)])
        for place, (plan, counts) in enumerate(zip(plans, sizes, strict=True)):
            if not len(counts):
                continue
            self._sizes[: len(counts), place] = counts
            first = np.cumsum(counts) - counts
            slots = np.arange(width)
            slots = first[:, None] + np.where(slots < counts[:, None], slots, 0)
            chosen = torch.cat(plan.batches).numpy()
            rows[: len(counts), place] = chosen[slots] + starts[place]
        device = self._labels.device
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
            images, labels = self._taken(step, step + 1, clients, width)
            x = self.inputs(images.flatten(0, 2)).contiguous()
            yield Batch(
                x.view(clients, width, *x.shape[1:]),
                labels[0],
                self.weights[step, :clients, :width],
                self.keys[step, :clients],
            )

    def taken(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return images (S, K, B, C, H, W), uint8, augmented, and labels (S, K, B) of some steps.

        Of all clients: those without such a step have examples of no weight.
        """
        return self._taken(begin, end, *self._rows.shape[1:])

    def _taken(self, begin: int, end: int, clients: int, width: int) -> tuple[Tensor, Tensor]:
        rows = self._rows[begin:end, :clients, :width]
        images = self._images[rows.flatten()]
        if self.inputs.augments:
            images = self._augmented(images, begin, end, clients, width)
        return images.view(*rows.shape, *images.shape[1:]), self._labels[rows]

    def _augmented(self, images: Tensor, begin: int, end: int, clients: int, width: int) -> Tensor:
        # Drawn for the true batch: what fills it up must not change the draws.
        places = [(step, client) for step in range(begin, end) for client in range(clients)]
        true = torch.from_numpy(self._sizes[begin:end, :clients].flatten())
        own = (torch.arange(width) < true[:, None]).flatten().to(images.device)
        generators = (
            torch_generator(t.seed, "augment", t.round_, t.client, step)
            for step, client in places
            for t in (self._tasks[client],)
        )
        images[own] = self.inputs.augmented_pieces(images[own], true.tolist(), generators)
        return images

    def _seeds(self, purpose: str) -> np.ndarray:
        seeds = np.zeros((len(self), len(self._tasks)), np.int64)
        for place, (task, steps) in enumerate(zip(self._tasks, self._steps, strict=True)):
            own = (task.seed, purpose, task.round_, task.client)
            seeds[:steps, place] = [derive(*own, step) for step in range(steps)]
        return seeds
