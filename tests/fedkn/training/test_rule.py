"""The protocol of an algorithm's client half, by rules that no loop can know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fedkn import normalizers
from fedkn.config import PrivacyConfig, TrainConfig
from fedkn.training import Inputs, LocalRule, LocalTask, LocalUpdate, train_locally, train_privately
from fedkn.training.stacked import train_stacked
from fedkn.training.stacked_batches import StackedClient
from fedkn.training.stacked_workspace import StackedWorkspace
from fedkn.training.workspace import Workspace
from tests.fedkn.training.test_local import build, data
from tests.fedkn.training.test_recorded import recording

PLAIN = Inputs("unit")
GROUP = normalizers.create("group")
PRIVATE = PrivacyConfig(mechanism="example", noise_multiplier=0.5)


@dataclass(frozen=True)
class Decay(LocalRule):
    """Weight decay, written as a rule: before clipping, which is off, or after it."""

    weight: float
    late: bool = False

    @property
    def acts(self) -> bool:
        return True

    def gradient(self, values: Tensor, gradients: Tensor, *begun: Tensor) -> None:
        if not self.late:
            gradients.add_(values, alpha=self.weight)

    def correct(self, values: Tensor, gradients: Tensor, *begun: Tensor) -> None:
        if self.late:
            gradients.add_(values, alpha=self.weight)

    def stacked(self, values, gradients, begun) -> None:
        torch._foreach_add_(gradients, values, alpha=self.weight)


@dataclass(frozen=True)
class Odometer(LocalRule):
    """Carries how far the client has come in all its rounds, from the vector that it began with."""

    @property
    def acts(self) -> bool:
        return True

    def begin(self, optimizer, task):
        return (optimizer.values.clone(),)

    def end(self, optimizer, task, steps, begun):
        before = task.carried.get("odometer", torch.zeros(()))
        return {"odometer": before + (optimizer.values - begun[0]).norm()}


def local(workspace: Workspace, task: LocalTask) -> LocalUpdate:
    return train_locally(workspace, *data(), task, inputs=PLAIN, normalizer=GROUP)


def private(workspace: Workspace, task: LocalTask) -> LocalUpdate:
    return train_privately(
        workspace, *data(), task, inputs=PLAIN, normalizer=GROUP, privacy=PRIVATE
    )


WAYS = {
    "eager": (Workspace, local),
    "recorded": (recording, local),
    "private": (Workspace, private),
}
Way = Callable[[Workspace, LocalTask], LocalUpdate]


def task(*rules: LocalRule, decay: float = 0.0, **changes) -> LocalTask:
    train = TrainConfig(batch_size=4, momentum=0.5, weight_decay=decay, clip_norm=0.0)
    return LocalTask(3, 2, 1, train, 0.05, rules, **changes)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_rule_adds_to_the_gradient_counts_wherever_steps_are_taken(way, late):
    make, train = WAYS[way]
    states = []
    for each in (task(Decay(0.1, late)), task(decay=0.1), task()):
        workspace = make(build("group"))
        workspace.load()
        train(workspace, each)
        states.append({name: value.clone() for name, value in workspace.state().items()})
    ruled, decayed, plain = states
    assert all(torch.equal(ruled[name], decayed[name]) for name in ruled)
    assert any(not torch.equal(ruled[name], plain[name]) for name in ruled)


def test_so_it_does_for_clients_that_are_stacked():
    model = build("group")
    ruled, decayed = (
        train_stacked(
            StackedWorkspace(model, 2),
            [StackedClient(each, {}, *data(size=size)) for size in (11, 6)],
            inputs=PLAIN,
            minimum_batch=1,
        )
        for each in (task(Decay(0.1)), task(decay=0.1))
    )
    for (_, mine), (_, other) in zip(ruled, decayed, strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("way", WAYS)
def test_what_a_rule_carries_is_its_own_and_goes_on(way):
    make, train = WAYS[way]
    workspace = make(build("group"))
    workspace.load()
    before = workspace.optimizer.values.clone()
    first = train(workspace, task(Odometer(), Decay(0.1)))
    distance = (workspace.optimizer.values - before).norm()
    torch.testing.assert_close(first.carried["odometer"], distance)
    workspace.load()
    second = train(workspace, task(Odometer(), Decay(0.1), carried=first.carried))
    torch.testing.assert_close(second.carried["odometer"], 2 * distance)


def test_the_null_rule_is_plain_training():
    states = []
    for each in (task(LocalRule()), task()):
        workspace = Workspace(build("group"))
        workspace.load()
        assert not local(workspace, each).carried
        states.append({name: value.clone() for name, value in workspace.state().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
