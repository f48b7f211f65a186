"""Local steps of K clients at once: one after another, stacked, and concurrently."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fedkn import models, normalizers
from fedkn.config import TrainConfig
from fedkn.experiment import layout_on
from fedkn.training import Inputs, LocalTask, Workspace, train_locally
from fedkn.training.concurrent import ConcurrentWorkspaces, train_concurrently
from fedkn.training.stacked import train_stacked
from fedkn.training.stacked_batches import StackedClient
from fedkn.training.stacked_workspace import StackedWorkspace
from simulations.benchmarks.gpu.device import Gpu

__all__ = ["StepCase", "StepTime", "measure_steps", "step_cases"]


@dataclass(frozen=True)
class StepCase:
    """Clients of ResNet-8 of `width` on 32x32 images, trained in a `way`, in local batches.

    `way`: "sequential", "stacked" or "concurrent".
    """

    way: str
    normalizer: str
    width: int
    batch: int
    clients: int
    side: int = 32
    steps: int = 40

    def __str__(self) -> str:
        return (
            f"{self.clients} x {self.normalizer}, {self.way}, width {self.width}, "
            f"batch {self.batch}"
        )


@dataclass(frozen=True)
class StepTime:
    """What a case took: milliseconds a step of all its clients, and of each.

    `first_seconds`: of the first round, in which steps are recorded. `peak_mib`: the most memory
    that its tensors held, images included.
    """

    case: StepCase
    milliseconds: float
    each: float
    first_seconds: float
    peak_mib: float


def step_cases() -> Iterator[StepCase]:
    """Yield the cases of the table, those with a goal first."""
    names = ("kernel", "group", "batch", "none")
    stacked = ("kernel", "group", "none")  # BatchNorm's clients cannot be
    cases = [
        *(StepCase("concurrent" if n == "batch" else "stacked", n, 16, 2, 64) for n in names),
        *(StepCase("sequential", n, 16, 2, 1) for n in names),
        *(StepCase("concurrent", n, 16, 2, 64) for n in names),
        *(StepCase("stacked", n, 16, 2, k) for k in (16, 256) for n in stacked),
        StepCase("concurrent", "batch", 16, 2, 16),
        *(StepCase("concurrent", n, 64, 2, 64) for n in names),
        *(StepCase("stacked", n, 64, 2, 64) for n in stacked),
        *(StepCase("sequential", n, 64, 2, 1) for n in names),
        *(StepCase("concurrent", n, 64, 2, 16) for n in names),
        *(StepCase("stacked", n, 64, 2, k) for k in (16, 256) for n in stacked),
        *(StepCase(way, "kernel", 16, 8, 64) for way in ("stacked", "concurrent")),
        *(StepCase(way, "ws_group", 16, 2, 64) for way in ("stacked", "concurrent")),
        StepCase("concurrent", "hbn", 16, 2, 64),
        *(StepCase("concurrent", n, 16, 2, 16) for n in stacked),
        # More than an engine trains at once in this way.
        *(StepCase("concurrent", "batch", width, 2, 256) for width in (16, 64)),
    ]
    yield from dict.fromkeys(cases)


def measure_steps(case: StepCase, device: Gpu, *, repetitions: int = 3) -> StepTime:
    """Time rounds of local steps, host work included; the fastest of `repetitions` counts."""
    normalizer = normalizers.create(case.normalizer)
    layout = layout_on(device.place, normalizer)
    train = TrainConfig(batch_size=case.batch)
    draw = torch.Generator().manual_seed(0)
    shape = (case.clients, case.steps * case.batch, 3, case.side, case.side)
    before = device.held()
    images = torch.randint(256, shape, dtype=torch.uint8, generator=draw).to(device.place)
    labels = torch.randint(10, shape[:2], generator=draw).to(device.place)
    model = _model(case, normalizer).to(device.place)
    model.to(memory_format=layout)  # type: ignore[call-overload]  # as torch has it

    def clients(round_: int) -> list[StackedClient]:
        tasks = [LocalTask(0, round_, place, train, 0.01) for place in range(case.clients)]
        return [StackedClient(t, {}, images[t.client], labels[t.client]) for t in tasks]

    inputs = Inputs("unit", memory_format=layout)
    started = time.perf_counter()
    round_of = _rounds(case, model, inputs, normalizer)
    round_of(clients(1))
    device.wait()
    first = time.perf_counter() - started
    seconds = []
    for number in range(2, 2 + repetitions):
        started = time.perf_counter()
        round_of(clients(number))
        device.wait()
        seconds.append(time.perf_counter() - started)
    milliseconds = 1000 * min(seconds) / case.steps
    each = milliseconds / case.clients
    return StepTime(case, milliseconds, each, first, device.peak() - before)


def _rounds(
    case: StepCase, model: nn.Module, inputs: Inputs, normalizer: normalizers.Normalizer
) -> Callable[[list[StackedClient]], object]:
    """Return what trains a round's clients in the way of `case`."""
    if case.way == "stacked":
        stacked = StackedWorkspace(model, case.clients)
        return lambda clients: train_stacked(stacked, clients, inputs=inputs, minimum_batch=1)
    if case.way == "concurrent":
        several = ConcurrentWorkspaces(model, case.clients)
        return lambda clients: train_concurrently(
            several, clients, inputs=inputs, normalizer=normalizer
        )
    workspace = Workspace(model)

    def one_by_one(clients: list[StackedClient]) -> None:
        for client in clients:
            workspace.load()
            train_locally(
                workspace,
                client.examples,
                client.targets,
                client.task,
                inputs=inputs,
                normalizer=normalizer,
            )

    return one_by_one


def _model(case: StepCase, normalizer: normalizers.Normalizer) -> nn.Module:
    return models.build(
        "resnet8",
        num_classes=10,
        in_channels=3,
        normalizer=normalizer,
        width=case.width,
        final_norm="kernel",
        seed=0,
    )
