"""Algorithms under which every client ends with a model of its own, against double precision."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Message
from torch import Tensor

from fedkn import algorithms
from fedkn.algorithms.fedper import personal_parameters
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import build_model, federated_data, inputs_of, why_alone
from fedkn.federation import arrays_to_tensors
from fedkn.training.batches import plan_batches
from server.rounds.cohorts import draw_cohort
from server.run import run_server
from server.strategies.registry import create_strategy
from tests.server.fake_grid import FIRST_NODE, FakeGrid, crashed, run, small

Parameters = dict[str, Tensor]
HEAD = ("head.fc.weight", "head.fc.bias")
NAMES = ("fedper", "fedrep", "ditto", "apfl")


def personal(name: str, **changes) -> ExperimentConfig:
    settings = {
        "strategy__name": name,
        "train__learning_rate": 0.1,
        "evaluation__client_fraction": 0.3,
        "rounds": 3,
        "train__clip_norm": 0.0,
    }
    return small(**{**settings, **changes})


class Naive:
    """The papers' algorithms over the project's data and batches, with autograd in float64."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config, self.data = config, federated_data(config)
        self.inputs = inputs_of(config, torch.device("cpu"))
        self.model = build_model(config).double()
        self.world = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.own: dict[int, Parameters] = {}
        self.mixtures: dict[int, float] = {}

    def gradient(self, at: Parameters, client: int, batch: Tensor) -> Parameters:
        mine = self.data.client(client)
        leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
        logits = torch.func.functional_call(
            self.model, leaves, (self.inputs(mine.inputs[batch]).double(),)
        )
        loss = F.cross_entropy(logits, mine.targets[batch])
        return dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True))

    def batches(self, round_: int, client: int, **changes) -> list[Tensor]:
        train = self.config.train.model_copy(update=changes)
        size = len(self.data.client(client))
        plan = plan_batches(size, train, 1, seed=self.config.seed, round_=round_, client=client)
        return plan.batches

    def run(self) -> None:
        config = self.config
        clients = range(config.partition.clients)
        for round_ in range(1, config.rounds + 1):
            cohort = draw_cohort(clients, config.cohort, seed=config.seed, round_=round_)
            ends, sizes = [], []
            for client in cohort:
                ends.append(getattr(self, config.strategy.name)(round_, client))
                sizes.append(len(self.data.client(client)))
            self.world = {
                name: sum(n / sum(sizes) * end[name] for n, end in zip(sizes, ends, strict=True))
                if name in ends[0]
                else value
                for name, value in self.world.items()
            }

    def fedper(self, round_: int, client: int) -> Parameters:
        w = {**self.world, **self.own.get(client, {})}
        for batch in self.batches(round_, client):
            g = self.gradient(w, client, batch)
            w = {n: v - 0.1 * g[n] for n, v in w.items()}
        self.own[client] = {n: w[n] for n in HEAD}
        return {n: v for n, v in w.items() if n not in HEAD}

    def fedrep(self, round_: int, client: int) -> Parameters:
        w = {**self.world, **self.own.get(client, {})}
        epochs = self.config.strategy.head_epochs
        for batch in self.batches(round_, client, local_epochs=epochs):
            g = self.gradient(w, client, batch)
            w = {n: v - 0.1 * g[n] if n in HEAD else v for n, v in w.items()}
        for batch in self.batches(round_, client):
            g = self.gradient(w, client, batch)
            w = {n: v if n in HEAD else v - 0.1 * g[n] for n, v in w.items()}
        self.own[client] = {n: w[n] for n in HEAD}
        return {n: v for n, v in w.items() if n not in HEAD}

    def ditto(self, round_: int, client: int) -> Parameters:
        weight, received = self.config.strategy.personal_weight, self.world
        w, v = dict(received), self.own.get(client, received)
        for batch in self.batches(round_, client):
            g, own = self.gradient(w, client, batch), self.gradient(v, client, batch)
            w = {n: x - 0.1 * g[n] for n, x in w.items()}
            v = {n: x - 0.1 * (own[n] + weight * (x - received[n])) for n, x in v.items()}
        self.own[client] = v
        return w

    def apfl(self, round_: int, client: int) -> Parameters:
        w, v = dict(self.world), self.own.get(client, self.world)
        a = self.mixtures.get(client, self.config.strategy.mixture)
        for batch in self.batches(round_, client):
            mixed = {n: a * v[n] + (1 - a) * w[n] for n in w}
            g, at_mixture = self.gradient(w, client, batch), self.gradient(mixed, client, batch)
            slope = sum(float(((v[n] - w[n]) * at_mixture[n]).sum()) for n in w)
            v = {n: x - 0.1 * a * at_mixture[n] for n, x in v.items()}
            w = {n: x - 0.1 * g[n] for n, x in w.items()}
            a = min(1.0, max(0.0, a - 0.1 * slope))
        self.own[client], self.mixtures[client] = v, a
        return w


def kept_by(grid: FakeGrid, client: int) -> dict[str, Tensor]:
    records = grid._contexts[FIRST_NODE + client].state.array_records
    newest = max(records, key=lambda name: int(name.partition("/")[2]))
    return arrays_to_tensors(records[newest])


PREFIX = {"fedper": "model/", "fedrep": "model/", "ditto": "own/", "apfl": "apfl/v/"}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_follows_the_papers_algorithm(name):
    changes = {"strategy__personal_weight": 2.0, "strategy__mixture": 0.3}
    config = personal(name, strategy__head_epochs=2, **changes)
    grid = FakeGrid(config)
    outcome = run_server(grid, config)
    naive = Naive(config)
    naive.run()
    shared = {n: v for n, v in naive.world.items() if n in outcome.tensors}
    assert shared.keys() == outcome.tensors.keys()
    for parameter, value in shared.items():
        np.testing.assert_allclose(outcome.tensors[parameter], value, rtol=2e-3, atol=2e-5)
    assert len(naive.own) >= 3
    for client, own in naive.own.items():
        kept = kept_by(grid, client)
        for parameter, value in own.items():
            mine = kept[PREFIX[name] + parameter]
            np.testing.assert_allclose(mine, value, rtol=2e-3, atol=2e-5)
        if name == "apfl":
            assert float(kept["apfl/a"]) == pytest.approx(naive.mixtures[client], abs=1e-4)
            assert float(kept["apfl/a"]) != pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("name", ["ditto", "apfl"])
def test_the_global_model_is_fedavgs(name):
    config = personal(name)
    plain = config.overlay(strategy__name="fedavg")
    assert run(config).weights_sha256 == run(plain).weights_sha256


def test_without_its_term_ditto_is_every_client_by_itself():
    config = personal("ditto", strategy__personal_weight=0.0, cohort=6)
    grid = FakeGrid(config)
    run_server(grid, config)
    naive = Naive(config)
    w = dict(naive.world)
    for round_ in (1, 2, 3):
        for batch in naive.batches(round_, 2):
            g = naive.gradient(w, 2, batch)
            w = {n: v - 0.1 * g[n] for n, v in w.items()}
    kept = kept_by(grid, 2)
    for parameter, value in w.items():
        np.testing.assert_allclose(kept[f"own/{parameter}"], value, rtol=2e-3, atol=2e-5)


def test_ditto_keeps_running_statistics_of_its_own():
    config = personal("ditto", normalizer__name="batch", train__batch_size=4)
    grid = FakeGrid(config)
    outcome = run_server(grid, config)
    (client, *_) = draw_cohort(range(6), 3, seed=config.seed, round_=3)
    kept = kept_by(grid, client)
    assert {n for n in kept if n.startswith("own/")} >= {f"own/{n}" for n in outcome.tensors}
    name = next(n for n in outcome.tensors if n.endswith("running_mean"))
    assert not np.allclose(kept[f"own/{name}"], outcome.tensors[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_crashed_ends_in_the_same_models(name, tmp_path):
    config = personal(name, rounds=4, checkpoint__folder=str(tmp_path))
    grid = crashed(config, in_round=3)
    resumed = run_server(grid, config)
    whole = FakeGrid(config.overlay(checkpoint__folder=""))
    undisturbed = run_server(whole, config.overlay(checkpoint__folder=""))
    assert resumed.weights_sha256 == undisturbed.weights_sha256
    for client in range(6):
        if whole._contexts[FIRST_NODE + client].state.array_records:
            one, other = kept_by(grid, client), kept_by(whole, client)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", ["fedper", "ditto"])
def test_a_client_that_fails_in_between_goes_on_from_where_it_counted(name):
    """As if it had not been asked: what it made of the lost round counts on neither side."""
    config = personal(name, cohort=6)

    def lose(round_: int, p: int, message: Message, reply: Message) -> Iterable[Message]:
        return [] if (round_, p) == (2, 4) else [reply]

    def skip(round_: int, p: int, message: Message, reply: Message) -> Iterable[Message]:
        if (round_, p) == (2, 4):
            before = grids[1]._contexts[FIRST_NODE + 4].state.array_records
            for record in [r for r in before if r.endswith("/2")]:
                del before[record]
            return []
        return [reply]

    grids = [FakeGrid(config, tamper) for tamper in (lose, skip)]
    one, other = (run_server(grid, config) for grid in grids)
    assert one.weights_sha256 == other.weights_sha256
    first, second = (kept_by(grid, 4) for grid in grids)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert one.weights_sha256 != run(config).weights_sha256


# -- what stays where --------------------------------------------------------------------------


def stays(patterns: str, **changes) -> set[str]:
    config = personal("fedper", strategy__local_parameters=patterns, **changes)
    return set(personal_parameters(config, build_model(config)))


def test_by_default_the_last_linear_layer_stays():
    assert stays("") == set(HEAD)


def test_patterns_name_layers_or_parameters():
    assert stays("head") == set(HEAD)
    assert stays("head.*, conv1") == stays("conv1") | set(HEAD)
    assert stays("*.bias") == {n for n in stays("*.norm, *.bias, head.fc.bias") if "bias" in n}
    assert stays("head.fc.bias") == {"head.fc.bias"}
    # By the module, not by a part of its name.
    with pytest.raises(UserError, match=r"nothing in model 'resnet8' is called 'hea'"):
        stays("hea")
    with pytest.raises(UserError, match="leaves nothing to share"):
        stays("*")


def test_what_stays_is_local_whatever_the_normalizer():
    config = personal("fedper", normalizer__name="batch")
    grid = FakeGrid(config)
    assert not set(HEAD) & set(run_server(grid, config).tensors)


@pytest.mark.parametrize("name", NAMES)
def test_their_clients_are_to_be_evaluated_on_their_own_images(name):
    with pytest.raises(UserError, match=rf"{name} keeps .* set evaluation\.client_fraction"):
        run(personal(name, evaluation__client_fraction=0.0))


def test_which_of_them_train_together():
    assert not why_alone(personal("fedper"))
    assert "fedrep trains two parts" in why_alone(personal("fedrep"))
    assert "ditto trains a second model" in why_alone(personal("ditto"))
    assert "apfl trains a second model" in why_alone(personal("apfl"))


def test_apfl_refuses_statistics():
    with pytest.raises(UserError, match="apfl mixes parameters, and the 'batch' normalizer keeps"):
        run(personal("apfl", normalizer__name="batch"))


@pytest.mark.parametrize("name", ["fedrep", "ditto", "apfl"])
def test_more_passes_than_the_account_of_dp_sgd_knows_are_refused(name):
    with pytest.raises(UserError, match="more than once in a round"):
        create_strategy(personal(name, privacy__mechanism="example"))
    assert create_strategy(personal("fedper", privacy__mechanism="example"))


def test_fedrep_refuses_a_velocity_that_would_move_the_head():
    with pytest.raises(UserError, match=r"fedrep needs train\.keep_momentum = false"):
        create_strategy(personal("fedrep", train__keep_momentum=True, train__momentum=0.5))


@pytest.mark.parametrize("name", ["fedrep", "ditto", "apfl"])
def test_a_message_that_lacks_what_they_need_is_refused(name):
    with pytest.raises(UserError, match="the server's message"):
        algorithms.local_rules(personal(name), {}, {})
