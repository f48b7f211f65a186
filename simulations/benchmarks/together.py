"""Clients trained together or one by one: ``python -m simulations.benchmarks.together``.

Five clients' local steps on one thread of the CPU, as the engines `inprocess` and `batched` take
them beneath the ClientApp: milliseconds a client's step, and the ratio by turn.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fedkn import models, normalizers
from fedkn.config import TrainConfig
from fedkn.training import Inputs, LocalTask, Workspace, train_locally
from fedkn.training.stacked import train_stacked
from fedkn.training.stacked_batches import StackedClient
from fedkn.training.stacked_workspace import StackedWorkspace
from simulations.benchmarks.timing import time_in_turn
from simulations.engines.allocator import keep_freed_memory

__all__ = ["Comparison", "measure"]

_CLIENTS, _STEPS = 5, 4


@dataclass(frozen=True)
class Comparison:
    """A network of `width` on images with `side` pixels to a side, in local batches of `batch`."""

    model: str
    width: int
    side: int
    normalizer: str
    batch: int


def measure(case: Comparison, repetitions: int) -> tuple[float, float, float]:
    """Return ms a client's step one after another, together, and the latter over the former."""
    normalizer = normalizers.create(case.normalizer)

    def model() -> torch.nn.Module:
        built = models.build(
            case.model, num_classes=10, in_channels=3, normalizer=normalizer, width=case.width
        )
        return built.to(memory_format=normalizer.memory_format)  # type: ignore[call-overload, no-any-return]  # as torch has it

    train = TrainConfig(batch_size=case.batch)
    draw = torch.Generator().manual_seed(0)
    shape = (_STEPS * case.batch, 3, case.side, case.side)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=draw)
    labels = torch.randint(10, shape[:1], generator=draw)
    inputs = Inputs("unit", memory_format=normalizer.memory_format)
    tasks = [LocalTask(0, 1, client, train, 0.01) for client in range(_CLIENTS)]
    workspace, stacked = Workspace(model()), StackedWorkspace(model(), _CLIENTS)

    def alone() -> None:
        for task in tasks:
            workspace.load()
            train_locally(workspace, images, labels, task, inputs=inputs, normalizer=normalizer)

    def together() -> None:
        clients = [StackedClient(task, {}, images, labels) for task in tasks]
        train_stacked(stacked, clients, inputs=inputs, minimum_batch=normalizer.minimum_batch)

    times = time_in_turn(
        {"alone": alone, "together": together}, repetitions=repetitions, device=workspace.device
    )
    steps = _CLIENTS * _STEPS
    return (
        times["alone"].median / steps * 1e3,
        times["together"].median / steps * 1e3,
        times["together"].ratio(times["alone"]),
    )


def _cases() -> Iterator[Comparison]:
    for model, width, side in (
        ("resnet8", 8, 8),
        ("resnet8", 8, 32),
        ("resnet8", 16, 32),
        ("convnet3", 8, 32),
        ("convnet3", 32, 32),
    ):
        for normalizer in ("kernel", "group"):
            for batch in (2, 4, 8):
                yield Comparison(model, width, side, normalizer, batch)


def _table() -> str:
    torch.set_num_threads(1)
    keep_freed_memory()
    lines = [
        "| network | images | normalizer | batch | one after another, ms | together, ms | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in _cases():
        alone, together, ratio = measure(case, repetitions=9)
        lines.append(
            f"| {case.model}, width {case.width} | {case.side}x{case.side} | {case.normalizer} "
            f"| {case.batch} | {alone:.2f} | {together:.2f} | x{ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(_table())
