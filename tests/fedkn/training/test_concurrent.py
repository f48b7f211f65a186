"""Clients that take turns, a step each, against one after another: the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedkn import models, normalizers
from fedkn.algorithms.scaffold import Scaffold
from fedkn.config import TrainConfig
from fedkn.training import Inputs, LocalTask, Workspace, train_locally
from fedkn.training.concurrent import ConcurrentWorkspaces, train_concurrently
from fedkn.training.kept_momentum import KeptMomentum
from fedkn.training.recorded import StepRecorder
from fedkn.training.stacked_batches import StackedClient
from tests.fedkn.training.test_recorded import Double

TRAIN = TrainConfig(batch_size=2, momentum=0.9)
RULES = (KeptMomentum(), Scaffold())
INPUTS = Inputs("unit", flip=True, crop_padding=1)


def build(name: str) -> nn.Module:
    return models.build(
        "resnet8",
        num_classes=10,
        in_channels=1,
        normalizer=normalizers.create(name),
        width=4,
        seed=0,
    )


def clients(model: nn.Module, sizes: tuple[int, ...] = (7, 3, 0, 4, 1)) -> list[StackedClient]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for client, size in enumerate(sizes):
        images = torch.randint(256, (size, 1, 8, 8), dtype=torch.uint8, generator=draw)
        labels = torch.randint(10, (size,), generator=draw)
        received = {
            name: p.detach() + 0.01 * torch.randn(p.shape, generator=draw)
            for name, p in model.named_parameters()
        }
        correction = {name: torch.full_like(p, 1e-3 * client) for name, p in received.items()}
        task = LocalTask(3, 2, client, TRAIN, 0.05, RULES, correction)
        found.append(StackedClient(task, received, images, labels))
    return found


def one_by_one(name: str, recording: bool) -> list[tuple[dict[str, Tensor], object]]:
    workspace = Workspace(build(name))
    if recording:
        workspace.recorder = StepRecorder(workspace, Double)
    results = []
    for client in clients(workspace.model):
        workspace.load(client.received)
        update = train_locally(
            workspace,
            client.examples,
            client.targets,
            client.task,
            inputs=INPUTS,
            normalizer=normalizers.create(name),
        )
        state = {key: value.clone() for key, value in workspace.state().items()}
        results.append((state, update))
    return results


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("name", ["kernel", "batch", "fbn", "hbn", "fixbn", "brn", "ws_group"])
def test_same_bits_as_one_after_another(name: str, recording: bool) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    workspaces = ConcurrentWorkspaces(model, 6)
    if recording:
        for workspace in workspaces.workspaces:
            workspace.recorder = StepRecorder(workspace, Double)
    for _ in range(2):
        together = train_concurrently(
            workspaces, clients(model), inputs=INPUTS, normalizer=normalizers.create(name)
        )
    for (update, state), (own, expected) in zip(
        together, one_by_one(name, recording), strict=False
    ):
        assert all(torch.equal(value, own[key]) for key, value in state.items())
        same = ("examples", "steps", "skipped_batches", "skipped_examples", "loss")
        assert all(getattr(update, key) == getattr(expected, key) for key in same)
        assert update.carried.keys() == expected.carried.keys()
        for key, value in update.carried.items():
            assert torch.equal(value, expected.carried[key])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_more_clients_than_workspaces_are_refused() -> None:
    model = build("none")
    with pytest.raises(ValueError, match="5 clients in workspaces for 2"):
        train_concurrently(
            ConcurrentWorkspaces(model, 2),
            clients(model),
            inputs=INPUTS,
            normalizer=normalizers.create("none"),
        )


def test_what_draws_from_the_device_trains_by_itself(monkeypatch) -> None:
    model = build("none")
    workspaces = ConcurrentWorkspaces(model, 5)
    for workspace in workspaces.workspaces:
        workspace.recorder = StepRecorder(workspace, Double)
        workspace.recorder.draws = True
    own = [
        replace(c, task=replace(c.task, train=TrainConfig(batch_size=1))) for c in clients(model)
    ]
    taken: list[int] = []
    for place, workspace in enumerate(workspaces.workspaces):
        step = workspace.optimizer.step

        def noted(*given, place=place, step=step, **named):
            taken.append(place)
            return step(*given, **named)

        monkeypatch.setattr(workspace.optimizer, "step", noted)
    train_concurrently(workspaces, own, inputs=INPUTS, normalizer=normalizers.create("none"))
    replayed = taken[-sum(len(c.targets) for c in own) :]
    assert replayed == sorted(replayed)
