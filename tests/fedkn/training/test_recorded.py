"""Steps that are recorded and replayed, with a double of the CUDA graph that runs on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedkn import normalizers
from fedkn.algorithms.fedprox import FedProx
from fedkn.algorithms.scaffold import Scaffold
from fedkn.config import TrainConfig
from fedkn.normalizers.frozen import freeze
from fedkn.training import Inputs, LocalTask, Workspace, recorded, train_locally
from fedkn.training.captured import Captured
from fedkn.training.kept_momentum import KeptMomentum
from fedkn.training.recorded import StepRecorder
from tests.fedkn.training.recorded_rounds import PLAIN, build, data, train

TRAIN = TrainConfig(batch_size=4, local_epochs=2, momentum=0.9, weight_decay=1e-3, clip_norm=1.0)
TASK = LocalTask(seed=3, round_=2, client=1, train=TRAIN, learning_rate=0.05)


class Double(Captured):
    """Calls the function as often as a capture does, and puts back what it changed."""

    made = 0

    def __init__(self, function: Callable[[], None], changed: Sequence[Tensor]) -> None:
        before = [tensor.clone() for tensor in changed]
        for _ in range(2):
            function()
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        self._function = function
        Double.made += 1

    def replay(self) -> None:
        self._function()


def recording(model: nn.Module) -> Workspace:
    workspace = Workspace(model)
    workspace.recorder = StepRecorder(workspace, Double)
    return workspace


def assert_close(one, other) -> None:
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        torch.testing.assert_close(other[0][name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert other[1].loss == pytest.approx(one[1].loss, rel=1e-5)
    for field in ("examples", "steps", "skipped_batches", "skipped_examples", "batch_size"):
        assert getattr(one[1], field) == getattr(other[1], field)
    assert one[1].carried.keys() == other[1].carried.keys()
    for name, value in one[1].carried.items():
        torch.testing.assert_close(other[1].carried[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", normalizers.names())
def test_replayed_steps_are_those_computed_as_they_come(name: str) -> None:
    workspace = recording(build(name))
    for round_ in (1, 2):
        task = replace(TASK, round_=round_)
        computed = train(Workspace(build(name)), task, name=name)
        assert_close(computed, train(workspace, task, name=name))
    assert workspace.recorder is not None
    assert not workspace.recorder.refusal


CASES = {
    "augmented": (TASK, Inputs("unit", flip=True, crop_padding=1)),
    "accumulated": (replace(TASK, train=TRAIN.model_copy(update={"accumulate": 2})), PLAIN),
    "divided": (replace(TASK, largest_batch=3), PLAIN),
    "proximal": (replace(TASK, rules=(FedProx(0.3),)), PLAIN),
    "batches of one": (replace(TASK, train=TrainConfig(batch_size=1)), PLAIN),
    "bfloat16": (replace(TASK, train=TRAIN.model_copy(update={"precision": "bfloat16"})), PLAIN),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_step_can_be_recorded(case: str) -> None:
    task, inputs = CASES[case]
    computed = train(Workspace(build("kernel")), task, inputs, "kernel")
    again = train(recording(build("kernel")), task, inputs, "kernel")
    if case == "bfloat16":
        assert again[1].loss == pytest.approx(computed[1].loss, rel=1e-3)
    else:
        assert_close(computed, again)


def test_corrections_and_kept_momentum_are_each_clients_own() -> None:
    model = build("none")
    corrections = [
        {name: torch.full_like(p, scale) for name, p in model.named_parameters()}
        for scale in (1e-3, -2e-3)
    ]
    workspace = recording(build("none"))
    rules = (KeptMomentum(), Scaffold())
    for client, correction in enumerate(corrections):
        task = replace(TASK, client=client, rules=rules, given=correction)
        first = train(Workspace(build("none")), task)
        assert_close(first, train(workspace, task))
        following = replace(task, round_=3, carried=first[1].carried)
        assert_close(train(Workspace(build("none")), following), train(workspace, following))


def test_one_recording_serves_all_clients_and_rounds_and_rates() -> None:
    workspace = recording(build("kernel"))
    train(workspace, TASK, name="kernel")
    made = Double.made
    for client, rate in ((2, 0.05), (3, 0.01)):
        task = replace(TASK, client=client, learning_rate=rate, round_=client)
        computed = train(Workspace(build("kernel")), task, name="kernel", data=data(15, client))
        replayed = train(workspace, task, name="kernel", data=data(15, client))
        assert_close(computed, replayed)
    assert Double.made == made


def test_long_rounds_are_taken_in_chunks(monkeypatch) -> None:
    computed = train(Workspace(build("kernel")), TASK, name="kernel", data=data(53))
    monkeypatch.setattr(recorded, "_BYTES_AT_ONCE", 192 * 9)
    workspace = recording(build("kernel"))
    assert_close(computed, train(workspace, TASK, name="kernel", data=data(53)))
    longer = train(Workspace(build("kernel")), TASK, name="kernel", data=data(71))
    assert_close(longer, train(workspace, TASK, name="kernel", data=data(71)))


def test_same_bits_whatever_was_recorded_before() -> None:
    alone = train(recording(build("batch")), TASK, name="batch")
    workspace = recording(build("batch"))
    train(workspace, replace(TASK, client=5, rules=(FedProx(0.1),)), name="batch", data=data(19, 4))
    state, update = train(workspace, TASK, name="batch")
    assert all(torch.equal(value, state[name]) for name, value in alone[0].items())
    assert update.loss == alone[1].loss


def test_steps_of_a_model_with_layers_at_rest_are_recorded() -> None:
    def resting() -> nn.Module:
        model = build("batch")
        norm = next(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
        freeze(model, [f"{norm}.*"])
        return model

    workspace = recording(resting())
    for round_ in (1, 2):
        task = replace(TASK, round_=round_)
        assert_close(
            train(Workspace(resting()), task, name="batch"), train(workspace, task, name="batch")
        )
    assert workspace.recorder is not None
    assert workspace.recorder.refusal == ""


class Tossing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) * (1.0 if random.random() < 0.5 else 0.5)


class Counting(Tossing):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(x.flatten(1)) / self.calls


@pytest.mark.parametrize("kind", [Tossing, Counting])
def test_a_forward_that_a_graph_would_freeze_is_not_recorded(kind, caplog) -> None:
    torch.manual_seed(0)
    workspace, other = recording(kind()), Workspace(kind())
    other.model.load_state_dict(workspace.model.state_dict())
    results = []
    for each in (workspace, other):
        random.seed(4)
        results.append(
            train_locally(
                each,
                *data(),
                TASK,
                inputs=PLAIN,
                normalizer=normalizers.create("none"),
            )
        )
    assert results[0].steps == 6
    assert results[0].loss == results[1].loss  # the look at it has left no trace
    assert workspace.recorder is not None
    assert "draws on the host" in workspace.recorder.refusal
    assert caplog.text.count("cannot be recorded") == 1


def test_what_cannot_be_captured_is_computed_as_it_comes(caplog) -> None:
    class Refusing(Double):
        def __init__(self, *arguments) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    workspace = Workspace(build("none"))
    workspace.recorder = StepRecorder(workspace, Refusing)
    computed = train(Workspace(build("none")), TASK)
    state, _ = train(workspace, TASK)
    assert all(torch.equal(value, state[name]) for name, value in computed[0].items())
    assert "operation not permitted" in caplog.text
