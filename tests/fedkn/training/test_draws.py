"""What networks from elsewhere draw follows from the task, whatever the process drew before."""

# ruff: noqa: NPY002 - the old global generator is what is tested

from __future__ import annotations

import concurrent.futures
import multiprocessing
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkn import models, normalizers
from fedkn.config import PrivacyConfig, TrainConfig
from fedkn.data.vision import import_torchvision
from fedkn.errors import UserError
from fedkn.tasks import CLASSIFICATION
from fedkn.training import (
    Inputs,
    LocalTask,
    Workspace,
    evaluate,
    train_locally,
    train_privately,
)
from fedkn.training.memory import saved_activations, step_memory
from fedkn.training.stacked import train_stacked
from fedkn.training.stacked_batches import StackedClient
from fedkn.training.stacked_workspace import StackedWorkspace

TASK = LocalTask(3, 1, 0, TrainConfig(batch_size=4, local_epochs=2), 0.05)
INPUTS = Inputs("unit")


class Drawing(nn.Module):
    """A small network that draws by `draw` between its two layers."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.last = nn.Linear(4 * 6 * 6, 3)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.draw(self.first(x)).flatten(1))
        return out


def functional(x: Tensor) -> Tensor:
    return F.dropout(x, 0.3, training=True)


def noise(x: Tensor) -> Tensor:
    return x + 0.1 * torch.rand(x.shape, device=x.device)


def python_depth(x: Tensor) -> Tensor:
    return x * (0.5 if random.random() < 0.5 else 1.5)


def numpy_noise(x: Tensor) -> Tensor:
    return x + float(np.random.normal())


def drop_path(x: Tensor) -> Tensor:
    """As timm's DropPath."""
    return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.7) / 0.7


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": nn.Dropout(0.3),
    "dropout2d": nn.Dropout2d(0.3),
    "alpha": nn.AlphaDropout(0.3),
    "rrelu": nn.RReLU(),
    "functional": functional,
    "rand": noise,
    "drop_path": drop_path,
    "python": python_depth,
    "numpy": numpy_noise,
}


def data(size: int = 10) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    images = torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8, generator=draw)
    return images, torch.arange(size) % 3


def network(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Drawing(DRAWS[name])


def pollute(number: int) -> None:
    torch.manual_seed(number)
    torch.rand(number)
    random.seed(number)
    np.random.seed(number)
    np.random.normal(size=number)


def after(workspace: Workspace, task: LocalTask, **states: Tensor) -> dict[str, Tensor]:
    workspace.load(states)
    train_locally(workspace, *data(), task, inputs=INPUTS, normalizer=normalizers.create("batch"))
    return {name: value.clone() for name, value in workspace.state().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("name", DRAWS)
def test_the_same_task_gives_the_same_bits_whatever_was_drawn_before(name: str) -> None:
    workspace = Workspace(network(name))
    pollute(1)
    first = after(workspace, TASK)
    pollute(22)
    assert same(first, after(workspace, TASK))
    assert same(first, after(Workspace(network(name)), TASK))
    for other in (replace(TASK, seed=4), replace(TASK, round_=2), replace(TASK, client=1)):
        assert not same(first, after(workspace, other))


@pytest.mark.parametrize("name", DRAWS)
def test_every_step_draws_anew(name: str) -> None:
    seen: list[Tensor] = []
    model = network(name)
    model.last.register_forward_hook(lambda _m, args, _out: seen.append(args[0].detach()))
    one = data(1)
    task = replace(TASK, learning_rate=0.0, train=TrainConfig(batch_size=1, local_epochs=8))
    workspace = Workspace(model)
    workspace.load()
    train_locally(workspace, *one, task, inputs=INPUTS, normalizer=normalizers.create("none"))
    assert len(seen) == 8
    assert len({bytes(x.numpy()) for x in seen}) > 1


def test_the_state_outside_is_left_as_it_was_found() -> None:
    model = Drawing(nn.Sequential(nn.Dropout(0.3)))
    workspace = Workspace(model)
    images, labels = data()

    def draws() -> tuple[float, ...]:
        normals = np.random.normal(), np.random.normal(), np.random.rand()
        return (*torch.rand(3).tolist(), random.random(), random.gauss(0, 1), *normals)

    def everything() -> None:
        after(workspace, TASK)
        evaluate(model, images, labels, INPUTS, 4, goal=CLASSIFICATION)
        step_memory(model, images.float(), labels, CLASSIFICATION)
        saved_activations(model, images.float())

    found = []
    for step in (lambda: None, everything):
        pollute(7)  # an odd number of normals: NumPy keeps one of a pair for the next call
        random.gauss(0, 1)
        step()
        found.append(draws())
    assert found[0] == found[1]


def test_the_state_outside_is_put_back_after_an_error_too() -> None:
    def fails(x: Tensor) -> Tensor:
        torch.rand(1)
        raise ZeroDivisionError

    workspace = Workspace(Drawing(fails))
    pollute(3)
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    with pytest.raises(ZeroDivisionError):
        after(workspace, TASK)
    torch.testing.assert_close(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))


def test_evaluation_of_a_network_that_draws_in_evaluation() -> None:
    model, (images, labels) = network("functional"), data()
    pollute(1)
    first = evaluate(model, images, labels, INPUTS, 4, goal=CLASSIFICATION)
    pollute(2)
    assert evaluate(model, images, labels, INPUTS, 4, goal=CLASSIFICATION) == first
    stochastic = models.build(
        "resnet8",
        num_classes=3,
        in_channels=3,
        width=4,
        normalizer=normalizers.create("kernel", dropout_p=0.3, eval_mode="stochastic"),
    )
    first = evaluate(stochastic, images, labels, INPUTS, 4, goal=CLASSIFICATION)
    pollute(3)
    assert evaluate(stochastic, images, labels, INPUTS, 4, goal=CLASSIFICATION) == first


def test_private_training_of_a_network_with_dropout() -> None:
    pytest.importorskip("opacus")
    privacy = PrivacyConfig(mechanism="example", clip_norm=1.0, noise_multiplier=0.5)
    found = []
    for number in (1, 2):
        workspace = Workspace(network("dropout"))
        pollute(number)
        workspace.load()
        train_privately(
            workspace,
            *data(),
            TASK,
            inputs=INPUTS,
            normalizer=normalizers.create("none"),
            privacy=privacy,
        )
        found.append({name: value.clone() for name, value in workspace.state().items()})
    assert same(*found)


@pytest.mark.parametrize("name", DRAWS)
def test_clients_that_train_together_are_refused_by_name(name: str) -> None:
    workspace = StackedWorkspace(network(name), 2)
    clients = [StackedClient(replace(TASK, client=c), {}, *data()) for c in (0, 1)]
    pollute(1)
    before = torch.get_rng_state()
    with pytest.raises(UserError, match="set engine = 'inprocess'") as refusal:
        train_stacked(workspace, clients, inputs=INPUTS, minimum_batch=1)
    assert torch.equal(before, torch.get_rng_state())
    if name == "dropout":
        assert "Dropout 'draw'" in str(refusal.value)


def _with_depth(kind: str) -> nn.Module:
    torchvision = import_torchvision()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "vgg":
            layers = torchvision.models.vgg.make_layers([4, "M", 8, "M"], batch_norm=True)
            head = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.Dropout(), nn.Linear(16, 3))
            return nn.Sequential(layers, head)
        drop = torchvision.ops.StochasticDepth(0.5, "row")
        return nn.Sequential(nn.Conv2d(3, 4, 3), drop, nn.Flatten(), nn.Linear(144, 3))


def _second_round(
    kind: str, received: dict[str, np.ndarray], clients: list[int]
) -> dict[int, dict[str, np.ndarray]]:
    """Round 2 of some clients, in a process that may have seen nothing of round 1."""
    workspace, results = Workspace(_with_depth(kind)), {}
    for client in clients:
        pollute(client + 11)
        states = {name: torch.from_numpy(value) for name, value in received.items()}
        trained = after(workspace, replace(TASK, round_=2, client=client), **states)
        results[client] = {name: value.numpy() for name, value in trained.items()}
    return results


@pytest.fixture(scope="module")
def workers() -> Iterator[concurrent.futures.Executor]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        yield pool


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("kind", ["vgg", "depth"])
def test_one_worker_two_workers_and_a_resume_agree(
    kind: str, workers: concurrent.futures.Executor
) -> None:
    """Networks of torchvision's parts with dropout and stochastic depth."""
    workspace = Workspace(_with_depth(kind))
    updates = [after(workspace, replace(TASK, client=client)) for client in (0, 1)]
    received = {name: value.numpy() for name, value in updates[1].items()}
    together = _second_round(kind, received, [0, 1])
    assert any((together[0][n] != together[1][n]).any() for n in received)
    tasks = [workers.submit(_second_round, kind, received, [client]) for client in (1, 0)]
    apart = tasks[0].result() | tasks[1].result()
    for client in (0, 1):
        assert all((together[client][n] == apart[client][n]).all() for n in received)
