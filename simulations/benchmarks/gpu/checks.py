"""What must hold on the device: the same bits, no waiting within a local epoch, agreement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkn import models, normalizers
from fedkn.config import TrainConfig
from fedkn.experiment import layout_on
from fedkn.training import Inputs, LocalTask, Workspace, train_locally
from fedkn.training.concurrent import ConcurrentWorkspaces, train_concurrently
from fedkn.training.draws import Draws
from fedkn.training.local import LocalRound
from fedkn.training.stacked_batches import StackedClient
from simulations.benchmarks.gpu.device import Gpu

__all__ = ["Check", "CheckCase", "check_cases", "check_normalizer"]

_CLIENTS, _IMAGES = 5, 21


@dataclass(frozen=True)
class CheckCase:
    """A normalizer in ResNet-8 of `width` on images of `side` pixels to a side."""

    normalizer: str
    width: int = 16
    side: int = 16

    def __str__(self) -> str:
        return self.normalizer


@dataclass(frozen=True)
class Check:
    """What holds of one normalizer on the device.

    Attributes:
        recorded: whether its steps are replayed. why_not: the reason where they are not.
        repeats: whether the same round again gives the same bits.
        concurrent: whether clients at once get the bits of one after another.
        waits: what made the host wait between the first and the last step; empty if nothing.
        difference: largest difference of a parameter from the CPU's after two steps, relative to
            the largest parameter of its tensor.
    """

    case: CheckCase
    recorded: bool
    why_not: str
    repeats: bool
    concurrent: bool
    waits: str
    difference: float


def check_cases() -> Iterator[CheckCase]:
    """Yield every normalizer, those of the other tables first."""
    names = dict.fromkeys(("kernel", "group", "batch", "none", *normalizers.names()))
    yield from map(CheckCase, names)


def check_normalizer(case: CheckCase, device: Gpu) -> Check:
    """Train a few clients with the normalizer in every way, and compare."""
    name, width, side, place = case.normalizer, case.width, case.side, device.place
    normalizer = normalizers.create(name)
    inputs = Inputs("unit", memory_format=layout_on(place, normalizer))
    model = _model(name, width, place)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (_IMAGES, 3, side, side), dtype=torch.uint8, generator=draw)
    labels = torch.randint(10, (_IMAGES,), generator=draw)
    train = TrainConfig(batch_size=2, momentum=0.9, precision="float32")
    clients = [
        StackedClient(LocalTask(1, 2, number, train, 0.01), {}, images.to(place), labels.to(place))
        for number in range(_CLIENTS)
    ]
    workspace = Workspace(model)

    def one_by_one() -> list[dict[str, Tensor]]:
        states = []
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
            states.append({name: value.clone() for name, value in workspace.state().items()})
        return states

    first, again = one_by_one(), one_by_one()
    workspace.load()
    several = ConcurrentWorkspaces(model, _CLIENTS)
    together = [
        state
        for _, state in train_concurrently(several, clients, inputs=inputs, normalizer=normalizer)
    ]
    recorder = workspace.recorder
    return Check(
        case,
        recorded=recorder is not None and not recorder.refusal,
        why_not="" if recorder is None else recorder.refusal,
        repeats=_equal(first, again),
        concurrent=_equal(first, together),
        waits=_waits(workspace, clients[0], inputs, normalizer, device),
        difference=_difference(name, width, place, clients[0]),
    )


def _model(name: str, width: int, device: torch.device) -> nn.Module:
    normalizer = normalizers.create(name)
    model = models.build(
        "resnet8",
        num_classes=10,
        in_channels=3,
        normalizer=normalizer,
        width=width,
        final_norm="kernel",
        seed=0,
    ).to(device)
    model.to(memory_format=layout_on(device, normalizer))  # type: ignore[call-overload]  # as torch has it
    return model


def _equal(some: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> bool:
    return all(
        torch.equal(value, other[name])
        for one, other in zip(some, others, strict=True)
        for name, value in one.items()
    )


def _waits(
    workspace: Workspace,
    client: StackedClient,
    inputs: Inputs,
    normalizer: normalizers.Normalizer,
    device: Gpu,
) -> str:
    workspace.load()
    local = LocalRound(
        workspace,
        client.examples,
        client.targets,
        client.task,
        inputs=inputs,
        normalizer=normalizer,
    )
    draws = Draws(workspace.device) if local.alone else None
    try:
        with device.no_waiting():
            for number in range(local.steps):
                local.take_step(number, draws)
    except RuntimeError as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def _difference(name: str, width: int, device: torch.device, client: StackedClient) -> float:
    states = []
    for where in (torch.device("cpu"), device):
        normalizer = normalizers.create(name)
        workspace = Workspace(_model(name, width, where))
        workspace.load()
        train_locally(
            workspace,
            client.examples[:4].to(where),
            client.targets[:4].to(where),
            client.task,
            inputs=Inputs("unit", memory_format=layout_on(where, normalizer)),
            normalizer=normalizer,
        )
        states.append({key: value.cpu().double() for key, value in workspace.state().items()})
    here, there = states
    return max(
        float((there[key] - value).abs().max() / value.abs().max().clamp_min(1e-3))
        for key, value in here.items()
    )
