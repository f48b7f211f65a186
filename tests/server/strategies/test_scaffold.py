"""SCAFFOLD against the paper's algorithm, written out in double precision."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Message

from fedkn.algorithms.scaffold import correction, next_control
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import build_model, federated_data, inputs_of
from fedkn.training.batches import plan_batches
from server.gate.screening import Update
from server.rounds.cohorts import draw_cohort
from server.run import run_server
from server.strategies.registry import create_strategy
from server.strategies.scaffold import Scaffold
from tests.server.fake_grid import FIRST_NODE, FakeGrid, crashed, run, small
from tests.server.test_run import log_of


def scaffold(**changes) -> ExperimentConfig:
    return small(strategy__name="scaffold", train__learning_rate=0.1, **changes)


# -- least squares: two parameters, clients with unlike optima -------------------------------------

CLIENTS, RATE, STEPS = 5, 0.05, (3, 1, 4, 2, 6)


def problem() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return (
        [rng.normal(size=(8, 4)) for _ in range(CLIENTS)],
        [rng.normal(size=8) + 3 * i for i in range(CLIENTS)],
    )


def gradient(client: int, w: np.ndarray) -> np.ndarray:
    a, b = problem()
    return a[client].T @ (a[client] @ w - b[client]) / len(b[client])


def join(parts) -> np.ndarray:
    return np.concatenate([np.asarray(parts["u"], np.float64), np.asarray(parts["v"], np.float64)])


def split(w: np.ndarray, dtype) -> dict[str, np.ndarray]:
    return {"u": w[:1].astype(dtype), "v": w[1:].astype(dtype)}


def naive(rounds: list[list[int]], server_rate: float) -> tuple[np.ndarray, np.ndarray]:
    """arXiv 1910.06378, Algorithm 1, line by line."""
    x, c, own = np.zeros(4), np.zeros(4), [np.zeros(4) for _ in range(CLIENTS)]
    for cohort in rounds:
        dx, dc = [], []
        for i in cohort:
            y = x.copy()
            for _ in range(STEPS[i]):
                y = y - RATE * (gradient(i, y) - own[i] + c)
            plus = own[i] - c + (x - y) / (STEPS[i] * RATE)
            dx.append(y - x)
            dc.append(plus - own[i])
            own[i] = plus
        x = x + server_rate * np.mean(dx, axis=0)
        c = c + len(cohort) / CLIENTS * np.mean(dc, axis=0)
    return x, c


@pytest.mark.parametrize("server_rate", ["default", 0.7])
def test_partial_participation_follows_the_papers_algorithm(server_rate):
    rounds = [[0, 1, 2], [1, 3, 4], [0, 2, 4], [2, 3]]
    config = ExperimentConfig.resolve(
        {
            "strategy.name": "scaffold",
            "strategy.server_learning_rate": server_rate,
            "train.learning_rate": RATE,
            "partition.clients": CLIENTS,
        }
    )
    strategy = Scaffold(config)
    x = split(np.zeros(4), np.float64)
    own: list[dict[str, torch.Tensor]] = [{} for _ in range(CLIENTS)]
    for number, cohort in enumerate(rounds, 1):
        control = {name: torch.from_numpy(v) for name, v in strategy.control(x).items()}
        start = {name: torch.from_numpy(value) for name, value in x.items()}
        updates = []
        for i in cohort:
            shift = join(correction(control, own[i]))
            y = join(x)
            for _ in range(STEPS[i]):
                y = y - RATE * (gradient(i, y) + shift)
            end = split(y, np.float64)
            own[i] = next_control(
                own[i],
                control,
                start,
                {name: torch.from_numpy(value) for name, value in end.items()},
                steps=STEPS[i],
                learning_rate=RATE,
            )
            updates.append(Update(i, end, {"steps": STEPS[i], "num-examples": 1 + 100 * i}))
        x = strategy.aggregate(number, x, updates)
    expected_x, expected_c = naive(rounds, 1.0 if server_rate == "default" else server_rate)
    np.testing.assert_allclose(join(x), expected_x, rtol=1e-12)
    np.testing.assert_allclose(join(strategy.control(x)), expected_c, rtol=1e-12)


def test_a_client_without_a_step_keeps_its_control():
    own, c, x = ({"w": torch.full((2,), value)} for value in (0.3, 0.5, 1.0))
    assert next_control(own, c, x, x, steps=0, learning_rate=0.1)["w"].tolist() == own["w"].tolist()


# -- whole runs -----------------------------------------------------------------------------------


def naive_run(config: ExperimentConfig) -> dict[str, torch.Tensor]:
    """SCAFFOLD over the project's data and batches, with autograd in double precision."""
    data = federated_data(config)
    inputs = inputs_of(config, torch.device("cpu"))
    model = build_model(config).double()
    names = [name for name, _ in model.named_parameters()]
    x = {name: p.detach().clone() for name, p in model.named_parameters()}
    c = {name: torch.zeros_like(value) for name, value in x.items()}
    own = [dict(c) for _ in range(config.partition.clients)]
    rate, momentum = config.train.learning_rate, config.train.momentum
    clients = config.partition.clients
    for round_ in range(1, config.rounds + 1):
        cohort = draw_cohort(range(clients), config.cohort, seed=config.seed, round_=round_)
        ends, changes = [], []
        for i in cohort:
            mine = data.client(i)
            plan = plan_batches(
                len(mine), config.train, 1, seed=config.seed, round_=round_, client=i
            )
            y = {name: value.clone().requires_grad_() for name, value in x.items()}
            v = {name: torch.zeros_like(value) for name, value in x.items()}
            for batch in plan.batches:
                images = inputs(mine.inputs[batch]).double()
                logits = torch.func.functional_call(model, y, (images,))
                loss = F.cross_entropy(logits, mine.targets[batch])
                grads = torch.autograd.grad(loss, [y[name] for name in names])
                v = {n: momentum * v[n] + g for n, g in zip(names, grads, strict=True)}
                y = {
                    n: (y[n] - rate * (v[n] - own[i][n] + c[n])).detach().requires_grad_()
                    for n in names
                }
            k = len(plan.batches)
            plus = {n: own[i][n] - c[n] + (x[n] - y[n].detach()) / (k * rate) for n in names}
            changes.append({n: plus[n] - own[i][n] for n in names})
            ends.append({n: y[n].detach() for n in names})
            own[i] = plus
        x = {n: torch.stack([end[n] for end in ends]).mean(0) for n in names}
        c = {n: c[n] + torch.stack([d[n] for d in changes]).sum(0) / clients for n in names}
    return x


@pytest.mark.parametrize(("momentum", "rate"), [(0.0, 0.1), (0.9, 0.02)])
def test_a_run_follows_the_papers_algorithm(momentum, rate):
    """With momentum niid_bench's: a velocity of plain gradients, and c - c_i beside it."""
    config = scaffold(rounds=3, train__clip_norm=0.0, train__momentum=momentum).overlay(
        train__learning_rate=rate
    )
    outcome = run(config)
    for name, value in naive_run(config).items():
        np.testing.assert_allclose(outcome.tensors[name], value.numpy(), rtol=2e-3, atol=2e-5)
    plain = run(config.overlay(strategy__name="fedavg"))
    moved = max(float(np.abs(outcome.tensors[n] - plain.tensors[n]).max()) for n in plain.tensors)
    assert moved > 1e-3  # what the control variates do is more than what the comparison allows


def test_with_one_client_it_is_fedavg():
    one = {"partition__clients": 1, "cohort": 1, "rounds": 3}
    mine, plain = run(scaffold(**one)), run(scaffold(**one).overlay(strategy__name="fedavg"))
    for name, value in plain.tensors.items():
        np.testing.assert_allclose(mine.tensors[name], value, rtol=1e-5, atol=1e-6)


def test_local_parameters_are_not_corrected():
    """FedBN: scales and biases stay on the clients, and c is about shared parameters alone."""
    config = scaffold(normalizer__name="fedbn", evaluation__client_fraction=0.2)
    assert all(np.isfinite(value).all() for value in run(config).tensors.values())


def test_a_run_that_crashed_ends_in_the_same_weights(tmp_path):
    config = scaffold(rounds=4, checkpoint__folder=str(tmp_path))
    grid = crashed(config, in_round=3)
    resumed = run_server(grid, config)
    undisturbed = run(config.overlay(checkpoint__folder=""))
    assert resumed.weights_sha256 == undisturbed.weights_sha256


def test_a_refused_update_changes_no_control_variate():
    """The run without the bad client's round, on server and client alike."""

    def spoil(round_: int, p: int, message: Message, reply: Message) -> Iterable[Message]:
        if round_ == 1 and p == refused:
            reply.content.metric_records["metrics"]["num-examples"] = 10**12
        return [reply]

    def silence(round_: int, p: int, message: Message, reply: Message) -> Iterable[Message]:
        return [] if round_ == 1 and p == refused else [reply]

    config = scaffold(rounds=3, cohort=5)
    first, second = (
        set(draw_cohort(range(6), 5, seed=config.seed, round_=round_)) for round_ in (1, 2)
    )
    refused = min(first & second)
    assert run(config, spoil).weights_sha256 == run(config, silence).weights_sha256
    assert run(config, spoil).weights_sha256 != run(config).weights_sha256


def test_a_kept_momentum_is_refused():
    with pytest.raises(UserError, match=r"scaffold needs train\.keep_momentum = false"):
        create_strategy(scaffold(train__momentum=0.9, train__keep_momentum=True))


@pytest.mark.parametrize(("name", "lost"), [("fedavg", 0), ("scaffold", 1)])
def test_only_clients_that_keep_something_can_lose_it(name, lost, tmp_path):
    config = small(strategy__name=name, checkpoint__folder=str(tmp_path), rounds=3, cohort=6)
    grid = FakeGrid(config, None)

    def forget(round_: int, p: int, message: Message, reply: Message) -> Iterable[Message]:
        if (round_, p) == (2, 4):
            grid._contexts[FIRST_NODE + 4].state.clear()
        return [reply]

    grid._tamper = forget
    run_server(grid, config)
    lines = log_of(tmp_path, "round")
    assert [line["state_lost"] for line in lines] == [[], [], [4] * lost]
