"""Steps recorded on the CPU and replayed in C++ have the bits of those computed as they come."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedkn import normalizers
from fedkn.algorithms.fedprox import FedProx
from fedkn.algorithms.scaffold import Scaffold
from fedkn.config import TrainConfig
from fedkn.data import vision
from fedkn.layers.native import library
from fedkn.training import Inputs, Workspace, host_recorder
from fedkn.training.kept_momentum import KeptMomentum
from tests.fedkn.training.recorded_rounds import (
    PLAIN,
    TASK,
    TRAIN,
    as_it_comes,
    assert_recorded,
    assert_same,
    build,
    data,
    recordings,
    train,
)

pytestmark = pytest.mark.skipif(not library.load(), reason="the native kernels cannot be had")


@pytest.fixture(autouse=True)
def soon(monkeypatch) -> None:
    """Record every kind of step when it is seen for the second time."""
    monkeypatch.setattr(host_recorder, "_WORTH", 1)


@pytest.mark.parametrize("name", normalizers.names())
def test_replayed_steps_are_those_computed_as_they_come(name: str) -> None:
    layout = normalizers.create(name).memory_format
    inputs = Inputs("unit", flip=True, memory_format=layout)
    workspace, other = Workspace(build(name)), as_it_comes(build(name))
    for round_ in (1, 2, 3):
        task = replace(TASK, round_=round_, client=round_)
        own = data(10 + round_, round_)
        assert_same(
            train(other, task, inputs, name, data=own),
            train(workspace, task, inputs, name, data=own),
        )
    assert_recorded(workspace)


CASES = {
    "accumulated": (replace(TASK, train=TRAIN.model_copy(update={"accumulate": 2})), PLAIN),
    "divided": (replace(TASK, largest_batch=3), PLAIN),
    "proximal": (replace(TASK, rules=(FedProx(0.3),)), PLAIN),
    "batches of one": (replace(TASK, train=TrainConfig(batch_size=1)), PLAIN),
    "not clipped": (replace(TASK, train=TRAIN.model_copy(update={"clip_norm": 0.0})), PLAIN),
    "plain": (replace(TASK, train=TrainConfig(batch_size=4, local_epochs=3)), PLAIN),
    "bfloat16": (replace(TASK, train=TRAIN.model_copy(update={"precision": "bfloat16"})), PLAIN),
    "augmented": (TASK, Inputs("unit", flip=True, crop_padding=1)),
}


@pytest.mark.parametrize("name", ["kernel", "group"])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_step_can_be_recorded(case: str, name: str) -> None:
    task, inputs = CASES[case]
    workspace = Workspace(build(name))
    assert_same(
        train(as_it_comes(build(name)), task, inputs, name), train(workspace, task, inputs, name)
    )
    if (case, name) == ("bfloat16", "kernel"):  # no kernel of ours: the definition looks at x
        assert workspace.host_recorder is not None
        assert "reads a tensor in Python" in workspace.host_recorder.refusal
    else:
        assert_recorded(workspace)


def test_corrections_and_kept_momentum_are_each_clients_own() -> None:
    corrections = [
        {name: torch.full_like(p, scale) for name, p in build("none").named_parameters()}
        for scale in (1e-3, -2e-3)
    ]
    workspace, other = Workspace(build("none")), as_it_comes(build("none"))
    rules = (KeptMomentum(), Scaffold())
    for client, correction in enumerate(corrections):
        task = replace(TASK, client=client, rules=rules, given=correction)
        first = train(other, task)
        assert_same(first, train(workspace, task))
        following = replace(task, round_=3, carried=first[1].carried)
        assert_same(train(other, following), train(workspace, following))
    assert_recorded(workspace)


def test_one_recording_serves_all_clients_and_rounds_and_rates() -> None:
    workspace = Workspace(build("kernel"))
    train(workspace, TASK, name="kernel")
    made = recordings(workspace)
    for client, rate in ((2, 0.05), (3, 0.01)):
        task = replace(TASK, client=client, learning_rate=rate, round_=client)
        own = data(15, client)
        computed = train(as_it_comes(build("kernel")), task, name="kernel", data=own)
        assert_same(computed, train(workspace, task, name="kernel", data=own))
    assert recordings(workspace) == made


def test_one_process_after_another_gets_the_same_whatever_was_recorded_before() -> None:
    alone = train(Workspace(build("batch")), TASK, name="batch")
    workspace = Workspace(build("batch"))
    train(workspace, replace(TASK, client=5, rules=(FedProx(0.1),)), name="batch", data=data(19, 4))
    assert_same(alone, train(workspace, TASK, name="batch"))


class Dropping(nn.Module):
    """PyTorch's own dropout, which draws from the generator that is the process's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.4)
        self.head = nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.conv(x)).relu().flatten(1)) * 2.0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_draws_of_pytorchs_own_dropout_are_those_of_the_steps_seed(accumulate: int) -> None:
    torch.manual_seed(0)
    model = Dropping()
    workspace, other = Workspace(model), None
    task = replace(TASK, train=TRAIN.model_copy(update={"accumulate": accumulate}))
    first = train(workspace, task)
    other = Dropping()
    other.load_state_dict(workspace._initial)
    assert_same(train(as_it_comes(other), task), first)
    assert_recorded(workspace)


BOUNDS = {
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "fmax": torch.fmax,
    "fmin": torch.fmin,
    "clamp": lambda x, bound: x.clamp(bound, bound + 0.5),
    "clamp_min": lambda x, bound: x.clamp_min(bound),
    "clamp_max": lambda x, bound: x.clamp_max(bound),
    "atan2": torch.atan2,
    "masked_fill": lambda x, bound: (x * bound).masked_fill(x > bound, 0.0),
}


class Bounding(nn.Module):
    """Holds maps against a learned number of each channel."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.conv = nn.Conv2d(3, 8, 3)
        self.bound = nn.Parameter(torch.linspace(-0.5, 0.5, 8).view(8, 1, 1))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(BOUNDS[self.name](self.conv(x), self.bound).mean((2, 3)))


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_formulas_of_autograd_are_replayed_as_they_are_without_a_look_at_them(name, layout) -> None:
    inputs = Inputs("unit", memory_format=layout)
    torch.manual_seed(0)
    workspace, other = Workspace(Bounding(name)), Bounding(name)
    other.load_state_dict(workspace._initial)
    assert_same(train(as_it_comes(other), TASK, inputs), train(workspace, TASK, inputs))
    assert_recorded(workspace)


def test_a_network_of_torchvision() -> None:
    torchvision = vision.import_torchvision()
    torch.manual_seed(0)
    workspace = Workspace(torchvision.models.shufflenet_v2_x0_5(num_classes=10))
    other = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    other.load_state_dict(workspace._initial)
    task = replace(TASK, train=TrainConfig(batch_size=4))
    own = (data(12)[0].repeat(1, 1, 4, 4), data(12)[1])
    assert_same(train(as_it_comes(other), task, data=own), train(workspace, task, data=own))
    assert_recorded(workspace)


def test_memory_does_not_grow_with_the_steps() -> None:
    workspace = Workspace(build("group"))
    for round_ in range(3):
        train(workspace, replace(TASK, round_=round_), name="group")
    before = _live()
    for round_ in range(3, 9):
        train(workspace, replace(TASK, round_=round_), name="group")
    assert _live() <= before


def _live() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def test_a_kind_of_step_that_is_rare_is_not_recorded(monkeypatch) -> None:
    monkeypatch.setattr(host_recorder, "_WORTH", 4)
    workspace = Workspace(build("none"))
    train(workspace, TASK)  # three epochs: six batches of four, three of three
    assert recordings(workspace) == 1


def test_an_error_in_a_replayed_step_leaves_it_able_to_go_on() -> None:
    workspace = Workspace(build("none"))
    expected = train(workspace, TASK)
    images, targets = data()
    with pytest.raises(IndexError, match="out of bounds"):
        train(workspace, TASK, data=(images, targets + 10))
    assert_same(expected, train(workspace, TASK))


def test_without_the_native_kernels_steps_are_computed_as_they_come() -> None:
    workspace = Workspace(build("none"))
    with library.switched_off():
        train(workspace, TASK)
    assert not recordings(workspace)
