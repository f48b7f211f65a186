"""Local rounds of small networks, with recorded steps and without."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fedkn import models, normalizers
from fedkn.config import TrainConfig
from fedkn.training import Inputs, LocalTask, Workspace, train_locally

TRAIN = TrainConfig(batch_size=4, local_epochs=3, momentum=0.9, weight_decay=1e-3, clip_norm=1.0)
TASK = LocalTask(seed=3, round_=2, client=1, train=TRAIN, learning_rate=0.05)
PLAIN = Inputs("unit")


def build(name: str, network: str = "resnet8", width: int = 8) -> nn.Module:
    return models.build(
        network,
        num_classes=10,
        in_channels=3,
        normalizer=normalizers.create(name),
        width=width,
        seed=0,
    )


def data(size: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


def as_it_comes(model: nn.Module) -> Workspace:
    workspace = Workspace(model)
    workspace.host_recorder = None
    return workspace


def train(workspace: Workspace, task: LocalTask, inputs: Inputs = PLAIN, name: str = "none", **own):
    workspace.load(own.get("state", {}))
    update = train_locally(
        workspace,
        *own.get("data", data()),
        task,
        inputs=inputs,
        normalizer=normalizers.create(name),
    )
    state = {key: value.clone() for key, value in workspace.state().items()}
    return state, replace(update, seconds=0.0)


def assert_same(one, other) -> None:
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert torch.equal(other[0][name], value), name
    assert replace(one[1], carried={}) == replace(other[1], carried={})
    assert one[1].carried.keys() == other[1].carried.keys()
    for name, value in one[1].carried.items():
        assert torch.equal(other[1].carried[name], value), name


def recordings(workspace: Workspace) -> int:
    recorder = workspace.host_recorder
    assert recorder is not None
    return sum(
        k.recorded is not None for kinds in recorder._settings.values() for k in kinds.values()
    )


def assert_recorded(workspace: Workspace) -> None:
    assert workspace.host_recorder is not None
    assert not workspace.host_recorder.refusal
    assert recordings(workspace)
