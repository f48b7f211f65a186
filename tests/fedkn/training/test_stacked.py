"""Clients trained together get what each of them gets by itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fedkn import models, normalizers
from fedkn.algorithms.fedprox import FedProx
from fedkn.config import TrainConfig
from fedkn.errors import UserError
from fedkn.training import (
    Inputs,
    LocalTask,
    LocalUpdate,
    Workspace,
    stacked_workspace,
    train_locally,
)
from fedkn.training.stacked import train_stacked
from fedkn.training.stacked_batches import StackedClient
from fedkn.training.stacked_workspace import StackedWorkspace
from tests.fedkn.training.test_recorded import Double

TOGETHER = [n for n in normalizers.names() if normalizers.create(n).together]
PLAIN = TrainConfig(batch_size=4, learning_rate=0.05, clip_norm=0)
FULL = TrainConfig(
    batch_size=4, local_epochs=2, learning_rate=0.05, momentum=0.9, weight_decay=0.01, clip_norm=0.5
)


def _model(normalizer: str) -> torch.nn.Module:
    return models.build(
        "resnet8",
        num_classes=3,
        in_channels=2,
        normalizer=normalizers.create(normalizer),
        width=8,
        final_norm="kernel",
    )


def _clients(
    normalizer: str, train: TrainConfig, sizes: tuple[int, ...], mu: float = 0.0
) -> list[StackedClient]:
    clients = []
    for place, size in enumerate(sizes):
        # Drawn so that no ReLU or pooling decides between numbers that are equal to rounding: such
        # a decision, made differently, shows in the fourth digit of a loss.
        draw = torch.Generator().manual_seed(20 + place)
        images = torch.randint(256, (size, 2, 12, 12), generator=draw, dtype=torch.uint8)
        labels = torch.randint(3, (size,), generator=draw)
        # Each starts from weights of its own: nothing may leak from one to another.
        received = {
            name: value + 0.02 * torch.randn(value.shape, generator=draw)
            for name, value in _model(normalizer).state_dict().items()
        }
        task = LocalTask(3, 2, 10 + place, train, train.learning_rate, (FedProx(mu),))
        clients.append(StackedClient(task, received, images, labels))
    return clients


def _each_alone(
    normalizer: str, clients: list[StackedClient], inputs: Inputs
) -> list[tuple[LocalUpdate, dict[str, Tensor]]]:
    workspace = Workspace(_model(normalizer))
    results = []
    for client in clients:
        workspace.load(client.received)
        update = train_locally(
            workspace,
            client.examples,
            client.targets,
            client.task,
            inputs=inputs,
            normalizer=normalizers.create(normalizer),
        )
        results.append((update, {k: v.clone() for k, v in workspace.state().items()}))
    return results


def _compare(
    alone: list[tuple[LocalUpdate, dict[str, Tensor]]],
    together: list[tuple[LocalUpdate, dict[str, Tensor]]],
) -> None:
    for (update, state), (other, values) in zip(alone, together, strict=True):
        counts = ("examples", "steps", "skipped_batches", "skipped_examples")
        assert [getattr(update, c) for c in counts] == [getattr(other, c) for c in counts]
        assert other.loss == pytest.approx(update.loss, rel=1e-4)
        assert state.keys() == values.keys()
        for name, value in state.items():
            torch.testing.assert_close(values[name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("normalizer", TOGETHER)
def test_the_same_weights_as_one_after_another(normalizer: str) -> None:
    inputs = Inputs("unit")
    # Different numbers of steps, a last batch of one, a client smaller than a batch.
    clients = _clients(normalizer, PLAIN, (9, 3, 16, 13))
    together = train_stacked(
        StackedWorkspace(_model(normalizer), 5), clients, inputs=inputs, minimum_batch=1
    )
    _compare(_each_alone(normalizer, clients, inputs), together)


@pytest.mark.parametrize("normalizer", ["kernel", "group"])
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_with_every_option(normalizer: str, mu: float) -> None:
    inputs = Inputs("unit", flip=True, crop_padding=2)
    clients = _clients(normalizer, FULL, (6, 11, 4), mu)
    workspace = StackedWorkspace(_model(normalizer), 3)
    together = train_stacked(workspace, clients, inputs=inputs, minimum_batch=1)
    _compare(_each_alone(normalizer, clients, inputs), together)


def test_nothing_passes_from_one_group_to_the_next() -> None:
    inputs = Inputs("unit")
    first, second = (_clients("group", FULL, sizes) for sizes in ((9, 5, 7), (8, 6)))
    used, fresh = (StackedWorkspace(_model("group"), 3) for _ in range(2))
    train_stacked(used, first, inputs=inputs, minimum_batch=1)
    again, once = (train_stacked(w, second, inputs=inputs, minimum_batch=1) for w in (used, fresh))
    for (_, state), (_, other) in zip(again, once, strict=True):
        for name, value in state.items():
            assert torch.equal(value, other[name]), name


def test_batches_below_the_minimum_are_skipped_and_counted() -> None:
    clients = _clients("group", PLAIN, (9, 3))
    inputs = Inputs("unit")
    workspace = StackedWorkspace(_model("group"), 2)
    (long, _), (short, state) = train_stacked(workspace, clients, inputs=inputs, minimum_batch=4)
    assert (long.examples, long.steps, long.skipped_batches, long.skipped_examples) == (8, 2, 1, 1)
    assert (short.examples, short.steps, short.loss) == (0, 0, 0.0)
    assert all(torch.equal(state[k], v) for k, v in clients[1].received.items())


def test_what_was_not_received_starts_as_initialised() -> None:
    model = _model("group")
    client = dataclasses.replace(_clients("group", PLAIN, (4,))[0], received={})
    workspace = StackedWorkspace(model, 1)
    workspace.load([client])
    assert all(torch.equal(workspace.states(1)[0][k], v) for k, v in model.state_dict().items())


def test_a_model_with_running_statistics_is_refused() -> None:
    with pytest.raises(UserError, match="inprocess"):
        StackedWorkspace(_model("batch"), 2)


def test_bad_weights_and_mixed_tasks_are_refused() -> None:
    clients = _clients("group", PLAIN, (4, 4))
    workspace = StackedWorkspace(_model("group"), 2)
    for received in ({"nothing": torch.zeros(1)}, {"head.fc.bias": torch.zeros(4)}):
        with pytest.raises(ValueError, match=next(iter(received))):
            workspace.load([dataclasses.replace(clients[0], received=received)])
    with pytest.raises(ValueError, match="2 clients"):
        StackedWorkspace(_model("group"), 1).load(clients)
    other = dataclasses.replace(clients[1].task, learning_rate=0.1)
    mixed = [clients[0], dataclasses.replace(clients[1], task=other)]
    with pytest.raises(ValueError, match="same training"):
        train_stacked(workspace, mixed, inputs=Inputs("unit"), minimum_batch=1)


@pytest.mark.parametrize("train", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_replayed_steps_are_those_computed_as_they_come(
    train: TrainConfig, mu: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a double of the CUDA graph: padded stacks, tables in chunks, one recording for all."""
    monkeypatch.setattr(stacked_workspace, "_MOST_STEPS", 3)
    inputs = Inputs("unit", flip=True, crop_padding=1)
    replaying = StackedWorkspace(_model("kernel"), 6)
    replaying.capture = Double
    for sizes in ((11, 3, 0, 25), (4, 9)):
        clients = _clients("kernel", train, sizes, mu)
        computed = train_stacked(
            StackedWorkspace(_model("kernel"), 6), clients, inputs=inputs, minimum_batch=2
        )
        expected = [(u, {k: v.clone() for k, v in state.items()}) for u, state in computed]
        replayed = train_stacked(replaying, clients, inputs=inputs, minimum_batch=2)
        _compare(expected, replayed)
    recorded = len(replaying.steps)
    train_stacked(
        replaying, _clients("kernel", train, (5, 18, 7), mu), inputs=inputs, minimum_batch=2
    )
    assert len(replaying.steps) == recorded


def test_a_model_that_was_changed_afterwards_is_refused_and_an_untouched_meaning_is_not() -> None:
    """What is stacked are copies: casts and cleared gradients change nothing for them."""
    (client,) = _clients("none", PLAIN, (5,))

    def result(workspace: StackedWorkspace) -> dict[str, Tensor]:
        ((_, state),) = train_stacked(workspace, [client], inputs=Inputs("unit"), minimum_batch=1)
        return {name: value.clone() for name, value in state.items()}

    expected = result(StackedWorkspace(_model("none"), 2))
    workspace = StackedWorkspace(_model("none"), 2)
    workspace.model.zero_grad()
    Workspace(workspace.model.double().float())
    assert all(torch.equal(v, expected[k]) for k, v in result(workspace).items())
    for change in (
        lambda m: m.head.fc.requires_grad_(False),
        lambda m: m.head.fc.register_parameter("more", torch.nn.Parameter(torch.zeros(1))),
        lambda m: m.double(),
    ):
        workspace = StackedWorkspace(_model("none"), 2)
        change(workspace.model)
        with pytest.raises(UserError, match="make a new one after changing a model"):
            result(workspace)
