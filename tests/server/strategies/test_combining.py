"""Flower's strategies on the stack make what Flower's own classes make of the same updates."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    MultiKrum,
    QFedAvg,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedkn.config import ExperimentConfig
from fedkn.seeds import derive
from fedkn.stack import Layout, Stack
from server.gate.screening import Update
from server.strategies import combining, robust
from server.strategies.base import NoAggregate
from server.strategies.differential_privacy import numpy_seeded
from server.strategies.flower import EVERY_NODE, Combined, FlowerStrategy
from server.strategies.registry import create_strategy

pytestmark = pytest.mark.usefixtures("server_process")

SHAPES = {"conv.weight": (3, 2, 2), "norm.mean": (3,), "gain": (), "fc.weight": (2, 3)}
PARAMETERS = ("conv.weight", "gain", "fc.weight")

Values = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.normal(size=shape)


def tied(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values of which many are equal, and of which float32 sums are exact."""
    return random.integers(-3, 4, size=shape)


def tensors(random: np.random.Generator, values: Values) -> dict[str, np.ndarray]:
    return {n: np.asarray(values(random, shape), np.float32) for n, shape in SHAPES.items()}


def some(clients: int, seed: int, values: Values = normal, refused: int = 0) -> list[Update]:
    """Updates in a stack, from which the gate has taken so many."""
    random = np.random.default_rng(seed)
    states = [tensors(random, values) for _ in range(clients + refused)]
    stack = Stack.of(Layout(states[0], PARAMETERS), states)
    stay = sorted(random.permutation(clients + refused)[:clients].tolist())
    return [
        Update(
            place,
            stack.rows()[place],
            {
                "num-examples": int(random.integers(1, 60)),
                "train-loss": float(random.uniform(0, 5)),
            },
        )
        for place in stay
    ]


def sent(seed: int = 7) -> dict[str, np.ndarray]:
    found = tensors(np.random.default_rng(seed), normal)
    return {name: found[name] for name in PARAMETERS}


def flat(arrays: Any) -> np.ndarray:
    return np.concatenate([np.asarray(arrays[n], np.float32).reshape(-1) for n in PARAMETERS])


def matrix(updates: list[Update]) -> np.ndarray:
    return np.stack([flat(update.arrays) for update in updates])


def theirs(build: Callable[..., Any], updates: list[Update], **options: Any) -> np.ndarray:
    """Return what Flower's class makes of `updates`, given to it one by one."""
    strategy = FlowerStrategy(build(**EVERY_NODE, **options), PARAMETERS)
    strategy.instructions(1, sent(), ConfigRecord())
    return flat(strategy.aggregate(1, sent(), updates))


def ours(
    build: Callable[..., Any], combine: Any, updates: list[Update], **options: Any
) -> np.ndarray:
    strategy = Combined(build(**EVERY_NODE, **options), PARAMETERS, combine)
    return flat(strategy.aggregate(1, sent(), updates))


clients, seeds = st.integers(1, 12), st.integers(0, 2**20)
values = st.sampled_from([normal, tied])
refusals = st.integers(0, 3)


@settings(max_examples=40, deadline=None)
@given(clients, seeds, values, refusals)
def test_the_median_is_flowers_to_the_bit(clients, seed, values, refused):
    updates = some(clients, seed, values, refused)
    expected = theirs(FedMedian, updates)
    np.testing.assert_array_equal(ours(FedMedian, combining.median, updates), expected)


@settings(max_examples=40, deadline=None)
@given(clients, seeds, values, refusals, st.floats(0, 0.49))
def test_the_trimmed_mean_is_flowers_to_rounding(clients, seed, values, refused, trim):
    """Which sums in float32: a unit in the last place of the largest for each of them."""
    updates = some(clients, seed, values, refused)
    expected = theirs(FedTrimmedAvg, updates, beta=trim)
    made = ours(FedTrimmedAvg, combining.trimmed_mean, updates, beta=trim)
    largest = np.abs(matrix(updates)).max(axis=0)
    assert (np.abs(made - expected) <= clients * 2.0**-23 * largest).all()


def scores(updates: list[Update], malicious: int) -> list[Fraction]:
    """Return Krum's scores, exactly, as the paper has them."""
    points = [[Fraction(float(x)) for x in row] for row in matrix(updates)]
    closest = max(1, len(points) - malicious - 2)
    return [
        sum(
            sorted(
                sum((x - y) ** 2 for x, y in zip(one, other, strict=True))
                for place, other in enumerate(points)
                if place != i
            )[:closest]
        )
        for i, one in enumerate(points)
    ]


@settings(max_examples=40, deadline=None)
@given(clients, seeds, values, st.integers(0, 3), st.integers(1, 12))
def test_krum_chooses_the_best_scores_and_of_equal_ones_the_first(
    clients, seed, values, malicious, select
):
    updates = some(clients, seed, values)
    chosen = robust.nearest([u.arrays for u in updates], PARAMETERS, malicious, select)
    exact = scores(updates, malicious)
    if values is normal:
        # Those that are equal, as of two that are each other's nearest, or farther apart than
        # float64 rounds.
        assume(all(b == a or b - a > 1e-9 for a, b in pairwise(sorted(exact))))
    assert chosen == sorted(range(clients), key=lambda place: exact[place])[:select]


@settings(max_examples=40, deadline=None)
@given(clients, seeds, refusals, st.integers(0, 3), st.integers(1, 12))
def test_krum_is_flowers_to_the_bit(clients, seed, refused, malicious, select):
    updates = some(clients, seed, normal, refused)
    # Flower's distances are float32, and of two clients it may take either.
    assume(all(b - a > 1e-3 for a, b in pairwise(sorted(scores(updates, malicious)))))
    options = {"num_malicious_nodes": malicious, "num_nodes_to_select": select}
    np.testing.assert_array_equal(
        ours(MultiKrum, combining.krum, updates, **options), theirs(MultiKrum, updates, **options)
    )


def test_krum_knows_near_updates_apart_far_from_zero():
    """By a norm of 1e4 and moves of 1e-2, of which float32 squares keep nothing."""
    random = np.random.default_rng(0)
    base = {name: np.full(shape, 1e4) for name, shape in SHAPES.items()}
    states = []
    for step in (0.01, 0.02, 0.05, 0.5):
        moved = {n: b + step * random.normal(size=b.shape) for n, b in base.items()}
        states.append({n: np.asarray(value, np.float32) for n, value in moved.items()})
    rows = Stack.of(Layout(states[0]), states[::-1]).rows()
    assert sorted(robust.nearest(rows, PARAMETERS, 1, 3)) == [1, 2, 3]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2), st.integers(0, 4), seeds, refusals)
def test_bulyan_is_flowers_to_rounding(malicious, more, seed, refused):
    updates = some(4 * malicious + 3 + more, seed, normal, refused)
    assume(all(b - a > 1e-3 for a, b in pairwise(sorted(scores(updates, malicious)))))
    options = {"num_malicious_nodes": malicious}
    np.testing.assert_allclose(
        ours(Bulyan, combining.bulyan, updates, **options),
        theirs(Bulyan, updates, **options),
        rtol=1e-5,
        atol=1e-6,
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), seeds)
def test_bulyans_mean_is_of_the_nearest_and_of_equally_near_ones_the_lesser(clients, keep, seed):
    keep = min(keep, clients)
    updates = some(clients, seed, tied)
    made = robust.bulyan_mean([u.arrays for u in updates], PARAMETERS, keep)
    for column, value in zip(matrix(updates).T, flat(made), strict=True):
        middle = float(np.median(column))
        nearest = sorted(column.tolist(), key=lambda x: (abs(x - middle), x))[:keep]
        assert value == pytest.approx(np.mean(nearest), abs=1e-6)


def test_bulyan_asks_for_enough_updates():
    with pytest.raises(NoAggregate, match="6 updates are too few"):
        ours(Bulyan, combining.bulyan, some(6, 0), num_malicious_nodes=1)


@settings(max_examples=30, deadline=None)
@given(clients, seeds, refusals, st.floats(0, 3))
def test_q_fedavg_is_flowers_to_rounding(clients, seed, refused, q):
    updates = some(clients, seed, normal, refused)
    options = {"client_learning_rate": 0.1, "q": q, "train_loss_key": "train-loss"}
    made = ours(QFedAvg, combining.q_mean, updates, **options)
    np.testing.assert_allclose(made, theirs(QFedAvg, updates, **options), rtol=1e-4, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([FedAvgM, FedAdam, FedYogi, FedAdagrad]),
    st.integers(1, 6),
    seeds,
    values,
    refusals,
)
def test_server_optimizers_are_flowers_to_the_bit_over_rounds(
    build, clients, seed, values, refused
):
    name = build.__name__.lower()
    config = ExperimentConfig.resolve({"strategy.name": name, "strategy.server_momentum": 0.9})
    options = {"server_momentum": 0.9} if build is FedAvgM else {}
    one = create_strategy(config, PARAMETERS)
    other = FlowerStrategy(build(**EVERY_NODE, **options), PARAMETERS)
    x = y = sent(seed)
    for round_ in range(1, 4):
        updates = some(clients, seed + round_, values, refused)
        ends = []
        for strategy, start in ((one, x), (other, y)):
            strategy.instructions(round_, start, ConfigRecord())
            made = strategy.aggregate(round_, start, updates)
            ends.append({n: np.asarray(made[n], np.float32) for n in PARAMETERS})
        x, y = ends
        np.testing.assert_array_equal(flat(x), flat(y))
    for key, value in other.state().items():
        np.testing.assert_array_equal(one.state()[key], value)


def test_blocks_of_columns_make_no_difference(monkeypatch):
    updates = some(9, 3)
    ends = [update.arrays for update in updates]

    def all_of_them() -> list[Any]:
        return [
            flat(robust.median(ends, PARAMETERS)),
            flat(robust.trimmed_mean(ends, PARAMETERS, 0.2)),
            flat(robust.bulyan_mean(ends, PARAMETERS, 5)),
            robust.nearest(ends, PARAMETERS, 1, 4),
        ]

    whole = all_of_them()
    for numbers in (1, 40):
        monkeypatch.setattr(robust, "_NUMBERS_AT_ONCE", numbers)
        for one, other in zip(whole, all_of_them(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_sorting_elsewhere_than_on_the_cpu_makes_no_difference(monkeypatch):
    updates = some(8, 5, tied)
    ends = [update.arrays for update in updates]
    here = robust.trimmed_mean(ends, PARAMETERS, 0.2), robust.bulyan_mean(ends, PARAMETERS, 5)
    monkeypatch.setattr(robust, "_ascending", lambda values: values.sort(dim=0).values)
    there = robust.trimmed_mean(ends, PARAMETERS, 0.2), robust.bulyan_mean(ends, PARAMETERS, 5)
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(flat(one), flat(other))


def test_no_aggregate_writes_into_the_updates():
    updates = some(7, 1)
    before = matrix(updates).copy()
    for name in ("krum", "multikrum", "fedmedian", "fedtrimmedavg", "bulyan", "qfedavg"):
        create_strategy(ExperimentConfig.resolve({"strategy.name": name}), PARAMETERS).aggregate(
            1, sent(), updates
        )
        np.testing.assert_array_equal(matrix(updates), before)


def test_the_noise_on_the_count_of_clipped_clients_is_drawn_before_that_on_the_mean():
    """arXiv 1905.03871, Algorithm 1: C exp(-0.2 (b - 0.5)), b the noised part not clipped."""
    config = ExperimentConfig.resolve(
        {
            "privacy.mechanism": "server_adaptive",
            "privacy.noise_multiplier": 0.3,
            "privacy.clip_norm": 5.2,
            "cohort": 8,
            "partition.clients": 20,
        }
    )
    strategy = create_strategy(config, PARAMETERS)
    start = sent()
    updates = some(5, 4)
    strategy.instructions(1, start, ConfigRecord())
    made = flat(strategy.aggregate(1, start, updates))
    moves = matrix(updates).astype(np.float64) - flat(start)
    lengths = np.linalg.norm(moves, axis=1)
    assert 0 < (lengths > 5.2).sum() < 5
    with numpy_seeded(derive(config.seed, "privacy-noise", 1)):
        part = np.random.normal((lengths > 5.2).sum(), 8 / 20) / 5  # noqa: NPY002
        noise = (0.3**-2 - 0.8**-2) ** -0.5 * 5.2 / 5
        drawn = np.random.normal(0, noise, made.shape)  # noqa: NPY002
    clipped = moves * np.minimum(1, 5.2 / lengths)[:, None]
    np.testing.assert_allclose(made, flat(start) + clipped.mean(0) + drawn, rtol=1e-5, atol=1e-6)
    norm = float(strategy.state()["clip_norm"])
    assert norm == pytest.approx(5.2 * np.exp(-0.2 * ((1 - part) - 0.5)))
