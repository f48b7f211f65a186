"""Local training of several clients at once, each by its own model on its own CUDA stream.

Every client has parameters, buffers and recorded steps of its own (`fedkn.training.recorded`). A
step of a small network on a tiny batch leaves most of a GPU idle, so the replays of many clients
run beside each other there. It serves whatever `train_locally` does, batch normalization and every
rule among it, and its bits are those of one client after another. Clients whose steps are not
recorded, or that draw from generators of the process, train one after another.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedkn.normalizers import Normalizer
from fedkn.training.inputs import Inputs
from fedkn.training.local import LocalRound, LocalUpdate
from fedkn.training.stacked_batches import StackedClient
from fedkn.training.workspace import Workspace

__all__ = ["ConcurrentWorkspaces", "train_concurrently"]


class ConcurrentWorkspaces:
    """A workspace and a stream for each of the clients that train at once, kept between rounds.

    Args:
        model: gives the forward pass and the initial values; it is left as it is.
        size: the most clients at once.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        self.workspaces = [Workspace(copy.deepcopy(model)) for _ in range(size)]
        device = self.workspaces[0].device
        self._streams: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            self._streams = [
                torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch annotates it so
                for _ in range(min(size, _STREAMS))
            ]

    def __len__(self) -> int:
        return len(self.workspaces)

    def turn(self, place: int) -> AbstractContextManager[object]:
        """Return the context in which the client at `place` computes."""
        if not self._streams:
            return nullcontext()
        return torch.cuda.stream(self._streams[place % len(self._streams)])

    def begin(self) -> None:
        """Let the streams wait for what the current one has done so far."""
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream())

    def end(self) -> None:
        """Let the current stream wait for what the streams have done."""
        for stream in self._streams:
            torch.cuda.current_stream().wait_stream(stream)


_STREAMS = 32
"""As many as work beside each other on a device; more clients share them."""


def train_concurrently(
    workspaces: ConcurrentWorkspaces,
    clients: Sequence[StackedClient],
    *,
    inputs: Inputs,
    normalizer: Normalizer,
) -> list[tuple[LocalUpdate, dict[str, Tensor]]]:
    """Train every client from what it received; return what came of each, and its tensors.

    The tensors are views, valid until the workspaces are used again. ``LocalUpdate.seconds`` is a
    client's share of the time that all of them took.

    Raises:
        ValueError: too many clients, or as `Workspace.load`.
    """
    if len(clients) > len(workspaces):
        raise ValueError(f"{len(clients)} clients in workspaces for {len(workspaces)}")
    started = time.perf_counter()
    begun: list[LocalRound] = []
    workspaces.begin()
    for place, client in enumerate(clients):
        workspace = workspaces.workspaces[place]
        with workspaces.turn(place):
            workspace.load(client.received)
            begun.append(
                LocalRound(
                    workspace,
                    client.examples,
                    client.targets,
                    client.task,
                    inputs=inputs,
                    normalizer=normalizer,
                )
            )
    updates: list[LocalUpdate] = []
    if any(local.alone for local in begun):
        for place, local in enumerate(begun):
            with workspaces.turn(place):
                updates.append(local.at_once())
            workspaces.end()
            workspaces.begin()
    else:
        for number in range(max((local.steps for local in begun), default=0)):
            for place, local in enumerate(begun):
                if number < local.steps:
                    with workspaces.turn(place):
                        local.take_step(number)
        for place, local in enumerate(begun):
            with workspaces.turn(place):
                updates.append(local.end())
    workspaces.end()
    share = (time.perf_counter() - started) / max(1, len(clients))
    return [
        (replace(update, seconds=share), workspaces.workspaces[place].state())
        for place, update in enumerate(updates)
    ]
