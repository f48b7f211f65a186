"""Steps recorded on the CPU and replayed in C++ have the bits of those computed as they come."""

from __future__ import annotations

import gc
import logging
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedkn import models, normalizers
from fedkn.algorithms.fedprox import FedProx
from fedkn.algorithms.scaffold import Scaffold
from fedkn.config import TrainConfig
from fedkn.data import vision
from fedkn.layers.native import library
from fedkn.training import Inputs, LocalTask, Workspace, host_recorder, train_locally
from fedkn.training.kept_momentum import KeptMomentum

TRAIN = TrainConfig(batch_size=4, local_epochs=3, momentum=0.9, weight_decay=1e-3, clip_norm=1.0)
TASK = LocalTask(seed=3, round_=2, client=1, train=TRAIN, learning_rate=0.05)
PLAIN = Inputs("unit")

pytestmark = pytest.mark.skipif(not library.load(), reason="the native kernels cannot be had")


@pytest.fixture(autouse=True)
def soon(monkeypatch) -> None:
    """Record every kind of step when it is seen for the second time."""
    monkeypatch.setattr(host_recorder, "_WORTH", 1)


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

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor * self.power


@pytest.mark.parametrize("change", [{"factor": torch.tensor(3.0)}, {"power": 0.5}])
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
        vars(each.model).update(change)
    assert_same(train(other, TASK), train(workspace, TASK))
    assert recordings(workspace) == 2 * made


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
