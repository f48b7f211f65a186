"""Local steps of K clients at once: one after another, stacked, and concurrently."""

from __future__ import annotations

import time
from collections.abc import Iterator
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


@dataclass(frozen=True)
class StepTime:
    """What a case took: milliseconds a step of all its clients, of each, and device memory."""

    case: StepCase
    milliseconds: float
    each: float
    first_seconds: float
    peak_mib: float


def step_cases(quick: bool) -> Iterator[StepCase]:
    """Yield the cases of the table; a few of each kind where `quick`."""
    ways = {"kernel": "stacked", "group": "stacked", "ws_group": "stacked", "none": "stacked"}
    for normalizer in ("kernel", "group", "batch", "none", "ws_group"):
        yield StepCase("sequential", normalizer, 16, 2, 1)
        for clients in (16, 64) if quick else (1, 16, 64, 256):
            if normalizer in ways:
                yield StepCase("stacked", normalizer, 16, 2, clients)
            if clients <= 64:
                yield StepCase("concurrent", normalizer, 16, 2, clients)
    for normalizer in ("kernel", "batch") if quick else ("kernel", "batch", "group"):
        if normalizer in ways:
            yield StepCase("stacked", normalizer, 64, 2, 64)
        yield StepCase("concurrent", normalizer, 64, 2, 64)
    yield StepCase("stacked", "kernel", 16, 8, 64)
    yield StepCase("concurrent", "kernel", 16, 8, 64)
    yield StepCase("concurrent", "hbn", 16, 2, 64)


def measure_steps(
    case: StepCase, device: torch.device, *, steps: int = 40, side: int = 32, repetitions: int = 3
) -> StepTime:
    """Time rounds of `steps` local steps, host work included; the fastest round counts."""
    normalizer = normalizers.create(case.normalizer)
    layout = layout_on(device, normalizer)
    train = TrainConfig(batch_size=case.batch)
    draw = torch.Generator().manual_seed(0)
    shape = (case.clients, steps * case.batch, 3, side, side)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=draw).to(device)
    labels = torch.randint(10, shape[:2], generator=draw).to(device)
    inputs = Inputs("unit", memory_format=layout)
    model = _model(case, normalizer).to(device)
    model.to(memory_format=layout)  # type: ignore[call-overload]  # as torch has it

    def clients(round_: int) -> list[StackedClient]:
        tasks = [LocalTask(0, round_, place, train, 0.01) for place in range(case.clients)]
        return [StackedClient(t, {}, images[t.client], labels[t.client]) for t in tasks]

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    if case.way == "stacked":
        stacked = StackedWorkspace(model, case.clients)

        def round_of(number: int) -> None:
            train_stacked(stacked, clients(number), inputs=inputs, minimum_batch=1)

    elif case.way == "concurrent":
        several = ConcurrentWorkspaces(model, case.clients)

        def round_of(number: int) -> None:
            train_concurrently(several, clients(number), inputs=inputs, normalizer=normalizer)

    else:
        workspace = Workspace(model)

        def round_of(number: int) -> None:
            for client in clients(number):
                workspace.load()
                train_locally(
                    workspace,
                    client.examples,
                    client.targets,
                    client.task,
                    inputs=inputs,
                    normalizer=normalizer,
                )

    round_of(1)
    _wait(device)
    first = time.perf_counter() - started
    seconds = []
    for number in range(2, 2 + repetitions):
        started = time.perf_counter()
        round_of(number)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    milliseconds = 1000 * min(seconds) / steps
    return StepTime(case, milliseconds, milliseconds / case.clients, first, peak)


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
