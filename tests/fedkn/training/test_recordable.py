"""What a replay would freeze is computed as it comes, and what modules hold is looked at."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedkn import normalizers
from fedkn.config import TrainConfig
from fedkn.layers.native import library
from fedkn.training import Workspace, host_recorder, train_locally
from tests.fedkn.training.recorded_rounds import (
    PLAIN,
    TASK,
    as_it_comes,
    assert_same,
    data,
    recordings,
    train,
)

pytestmark = pytest.mark.skipif(not library.load(), reason="the native kernels cannot be had")


@pytest.fixture(autouse=True)
def soon(monkeypatch) -> None:
    """Record every kind of step when it is seen for the second time."""
    monkeypatch.setattr(host_recorder, "_WORTH", 1)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class Tossing(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if random.random() < 0.5 else 0.5)


class Counting(Plain):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


class Tallying(Plain):
    """Counts in a list within a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"calls": [0]}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["calls"][0] += 1
        return super().forward(x) / self.seen["calls"][0]


class Sharing(Plain):
    """Counts in its class."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        Sharing.passes += 1
        return super().forward(x) / Sharing.passes


_TURNS = 0


class Turning(Plain):
    """Counts in its file."""

    def forward(self, x: Tensor) -> Tensor:
        global _TURNS  # noqa: PLW0603 - what is tested
        _TURNS += 1
        return super().forward(x) / _TURNS


class Branching(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if y.sum() > 0 else y


class Listing(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * max(x.flatten().tolist())


class Masking(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + y[y > 0].mean()


class Foreign(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x.detach().numpy().max())


class Replacing(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) - self.mean
        self.mean = y.detach().mean(0)
        return y


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Tossing, "draws in Python"),
        (Counting, "counts there"),
        (Tallying, "counts there"),
        (Sharing, "counts there"),
        (Turning, "counts there"),
        (Branching, "reads a tensor in Python"),
        (Listing, "reads a tensor in Python"),
        (Foreign, "reads a tensor in Python"),
        (Masking, "depend on what is in them"),
        (Replacing, "replaces buffers"),
    ],
)
def test_what_a_replay_would_freeze_is_computed_as_it_comes(kind, reason, caplog) -> None:
    torch.manual_seed(0)
    workspace = Workspace(kind())
    other = as_it_comes(kind())
    other.model.load_state_dict(workspace.model.state_dict())
    results = []
    with caplog.at_level(logging.INFO, logger="flwr"):
        for each in (workspace, other):
            random.seed(4)
            Sharing.passes = globals()["_TURNS"] = 0
            results.append(
                train_locally(
                    each, *data(), TASK, inputs=PLAIN, normalizer=normalizers.create("none")
                )
            )
    assert replace(results[0], seconds=0) == replace(results[1], seconds=0)
    for mine, theirs in zip(
        workspace.model.state_dict().values(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert workspace.host_recorder is not None
    assert reason in workspace.host_recorder.refusal
    assert caplog.text.count("are not recorded") == 1


class Held(Plain):
    """What it multiplies by is no parameter, no buffer, and not always the same."""

    factor = torch.tensor(2.0)
    power = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"scale": [1.0]}

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * self.factor * self.power
        return y * self.settings["scale"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "factor", torch.tensor(3.0)),
        lambda model: setattr(model, "power", 0.5),
        lambda model: model.settings["scale"].__setitem__(0, 0.5),
    ],
)
def test_what_modules_hold_in_python_belongs_to_a_recording(change) -> None:
    torch.manual_seed(0)
    workspace = Workspace(Held())
    other = as_it_comes(Held())
    other.model.load_state_dict(workspace.model.state_dict())
    workspace._initial = other._initial
    for each in (workspace, other):
        each.model.factor = torch.tensor(2.0)
    assert_same(train(other, TASK), train(workspace, TASK))
    made = recordings(workspace)
    for each in (workspace, other):
        change(each.model)
    assert_same(train(other, TASK), train(workspace, TASK))
    assert recordings(workspace) == 2 * made


class Growing(Plain):
    """Holds another thing in every pass: what it makes of it is nobody's guess."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


def test_a_module_that_holds_other_things_in_every_round_is_not_recorded_nor_kept() -> None:
    workspace = Workspace(Growing())
    short = replace(TASK, train=TrainConfig(batch_size=11))
    for round_ in range(20):
        train(workspace, replace(short, round_=round_))
    assert workspace.host_recorder is not None
    assert "in every round" in workspace.host_recorder.refusal


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["forward", "parameter", "all"])
def test_hooks_of_somebodys_own_are_called(kind: str, late: bool) -> None:
    workspace, seen = Workspace(Plain()), []

    def see(*arguments: object) -> None:
        seen.append(arguments)

    def hook() -> None:
        model = workspace.model
        if kind == "forward":
            model.head.register_forward_hook(see)
        elif kind == "parameter":
            model.head.weight.register_hook(see)
        else:
            handles.append(nn.modules.module.register_module_forward_hook(see))

    handles: list = []
    try:
        if late:
            train(workspace, TASK)
            assert recordings(workspace)
        hook()
        train(workspace, TASK)
        before = len(seen)
        train(workspace, TASK)
        assert len(seen) == 2 * before > 0
    finally:
        for handle in handles:
            handle.remove()
    assert workspace.host_recorder is not None
    assert "hooks" in workspace.host_recorder.refusal
