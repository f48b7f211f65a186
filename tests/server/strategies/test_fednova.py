from __future__ import annotations

import numpy as np
import pytest

from fedkn.algorithms.fednova import step_weight
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from server.gate.screening import Update
from server.strategies.fednova import FedNova
from server.strategies.registry import create_strategy
from tests.server.fake_grid import run, small


def nova(**changes) -> FedNova:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return FedNova(ExperimentConfig.resolve({"strategy.name": "fednova", **dotted}))


def updates(steps: list[int], examples: list[int]) -> list[Update]:
    rng = np.random.default_rng(1)
    return [
        Update(
            i,
            {"w": rng.normal(size=(3, 2)), "b": np.asarray(rng.normal())},
            {"steps": k, "num-examples": n},
        )
        for i, (k, n) in enumerate(zip(steps, examples, strict=True))
    ]


SENT = {"w": np.full((3, 2), 0.4), "b": np.asarray(-1.0)}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_step_weight_is_the_sum_of_the_gradients_weights(momentum):
    """Unroll SGD with momentum on gradients that are all one."""
    for steps in (1, 2, 5, 40):
        velocity = moved = 0.0
        for _ in range(steps):
            velocity = momentum * velocity + 1.0
            moved += velocity
        assert step_weight(steps, momentum) == pytest.approx(moved, rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equal_steps_are_fedavg(momentum):
    some = updates([7, 7, 7], [10, 30, 5])
    after = nova(train__momentum=momentum).aggregate(1, SENT, some)
    for name in SENT:
        mean = np.average([u.arrays[name] for u in some], axis=0, weights=[10, 30, 5])
        np.testing.assert_allclose(after[name], mean, rtol=1e-12)


@pytest.mark.parametrize(("momentum", "rate"), [(0.0, "default"), (0.0, 0.5), (0.8, 2.0)])
def test_unequal_steps_follow_the_papers_formula(momentum, rate):
    """arXiv 2007.07481, Eq. 8: x - tau_eff sum p_i lr d_i, with lr d_i = (x - y_i)/|a_i|."""
    steps, examples = [1, 12, 5], [10, 30, 5]
    some = updates(steps, examples)
    after = nova(train__momentum=momentum, strategy__server_learning_rate=rate).aggregate(
        1, SENT, some
    )
    parts = np.array(examples) / sum(examples)
    # Section 4.1: a_i = [1 - r^t, ..., 1 - r]/(1 - r)
    sizes = [sum((1 - momentum**k) / (1 - momentum) for k in range(1, t + 1)) for t in steps]
    for name, x in SENT.items():
        directions = [(x - u.arrays[name]) / size for u, size in zip(some, sizes, strict=True)]
        step = (parts @ sizes) * np.tensordot(parts, np.array(directions), 1)
        expected = x - (1.0 if rate == "default" else rate) * step
        np.testing.assert_allclose(after[name], expected, rtol=1e-12)


def test_runs():
    """Capped at equal steps a run is FedAvg's; without a cap unequal clients make a difference."""
    capped = small(strategy__name="fednova")
    plain = capped.overlay(strategy__name="fedavg")
    for name, value in run(plain).tensors.items():
        np.testing.assert_allclose(run(capped).tensors[name], value, rtol=1e-4, atol=1e-6)
    unequal = {"train__local_steps": 0, "train__batch_size": 16, "partition__scheme": "quantity"}
    one, two = run(capped.overlay(**unequal)), run(plain.overlay(**unequal))
    assert any(np.abs(one.tensors[n] - v).max() > 1e-4 for n, v in two.tensors.items())


def test_kept_momentum_is_refused():
    with pytest.raises(UserError, match=r"fednova needs train\.keep_momentum = false"):
        create_strategy(small(strategy__name="fednova", train__keep_momentum=True))
