from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.normalizers import FederationRule, TensorRole
from fedkn.seeds import derive
from fedkn.training.update_clipping import clip_update
from server.gate.screening import Update
from server.rounds.aggregation import Aggregator
from server.strategies.differential_privacy import numpy_seeded
from server.strategies.flower import FlowerStrategy
from server.strategies.registry import create_strategy
from tests.server.fake_grid import ScriptedGrid, run, small
from tests.server.test_run import log_of

MECHANISMS = ("server_fixed", "server_adaptive", "client_fixed", "client_adaptive")
SHAPES = {"w": (40, 50), "scale": (), "b": (3,)}


@pytest.fixture(scope="module", autouse=True)
def _server_process():
    ScriptedGrid([], lambda message: [])


def configured(mechanism: str, **changes) -> ExperimentConfig:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return ExperimentConfig.resolve(
        {"privacy.mechanism": mechanism, "partition.clients": 40, "cohort": 20}, dotted
    )


def make(mechanism: str, **changes) -> Aggregator:
    rule = FederationRule(dict.fromkeys(SHAPES, TensorRole.SHARED))
    return Aggregator(configured(mechanism, **changes), lambda round_: rule, SHAPES)


def sent() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: np.asarray(rng.normal(size=s), np.float32) for n, s in SHAPES.items()}


def updates(norms: list[float]) -> list[Update]:
    """Updates that move the weights by these norms, with very unlike numbers of examples."""
    result = []
    for partition, norm in enumerate(norms):
        rng = np.random.default_rng(100 + partition)
        moves = {n: rng.normal(size=s) for n, s in SHAPES.items()}
        length = np.sqrt(sum(np.square(move).sum() for move in moves.values()))
        arrays = {
            n: np.asarray(start + moves[n] * (norm / length), np.float32)
            for n, start in sent().items()
        }
        metrics = {"num-examples": 1 + 500 * partition, "train-loss": 1.0}
        result.append(Update(partition, arrays, metrics))
    return result


def clipped_to(norm: float, trained: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what a client sends that clips."""
    ends, start = (
        {name: torch.from_numpy(value) for name, value in arrays.items()}
        for arrays in (trained, sent())
    )
    return {name: value.numpy() for name, value in clip_update(ends, start, norm).items()}


def aggregated(aggregator: Aggregator, some: list[Update], round_: int = 1):
    aggregator.training_config(round_, sent(), ConfigRecord())
    return aggregator.aggregate(round_, sent(), some)


# -- clipping -------------------------------------------------------------------------------------


def test_clipping_is_over_all_parameters_together_zero_dimensional_ones_too():
    (update,) = updates([5.0])
    clipped = clipped_to(2.0, update.arrays)
    for name, start in sent().items():
        expected = start + (update.arrays[name].astype(np.float64) - start) * 0.4
        np.testing.assert_allclose(clipped[name], expected, rtol=1e-4, atol=1e-6)
        assert clipped[name].dtype == np.float32
        assert clipped[name].shape == start.shape


def test_small_and_zero_updates_are_left_alone():
    (update,) = updates([0.5])
    for trained in (update.arrays, sent()):
        clipped = clipped_to(2.0, trained)
        assert all(np.array_equal(clipped[name], trained[name]) for name in SHAPES)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_without_noise_it_is_the_uniform_mean_of_clipped_updates(mechanism):
    some = updates([0.1, 3.0, 0.0, 10.0])
    after = aggregated(make(mechanism, privacy__noise_multiplier=0.0), some)
    for name, start in sent().items():
        moves = [u.arrays[name].astype(np.float64) - start for u in some]
        factors = (1.0, 1 / 3, 1.0, 0.1)
        mean = start + np.mean([m * f for m, f in zip(moves, factors, strict=True)], axis=0)
        np.testing.assert_allclose(after[name], mean, rtol=1e-4, atol=1e-6)


# -- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mechanism", "count"), [("server_fixed", 20), ("client_fixed", 4), ("server_adaptive", 20)]
)
def test_the_noises_deviation_is_that_of_the_updates_that_came(mechanism, count):
    """z C/n; adaptive: z_delta = (z^-2 - (2 b)^-2)^-1/2, b = cohort/20 (arXiv 1905.03871)."""
    some = updates([3.0] * count)
    noisy = make(mechanism, privacy__noise_multiplier=0.8, privacy__clip_norm=1.5)
    silent = make(mechanism, privacy__noise_multiplier=0.0, privacy__clip_norm=1.5)
    noise = aggregated(noisy, some)["w"] - aggregated(silent, some)["w"]
    z = (0.8**-2 - 2.0**-2) ** -0.5 if mechanism == "server_adaptive" else 0.8
    deviation = z * 1.5 / count
    # 2000 numbers: the relative error of a standard deviation is 1.6%, of a mean 2.2% of it.
    assert noise.std() == pytest.approx(deviation, rel=0.07)
    assert abs(noise.mean()) < 0.1 * deviation
    assert noisy.fields() == {"clip_norm": 1.5, "noise_deviation": pytest.approx(deviation)}


def test_noise_is_a_function_of_seed_and_round():
    some = updates([3.0] * 5)

    def draw(round_: int, **changes) -> np.ndarray:
        return aggregated(make("server_fixed", **changes), some, round_)["w"]

    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))
    assert not np.array_equal(draw(1), draw(1, seed=1))
    assert not np.array_equal(draw(1, privacy__secret=True), draw(1, privacy__secret=True))


def test_numpys_global_generator_is_put_back():
    np.random.seed(3)  # noqa: NPY002  # the state that must survive
    expected = np.random.normal(size=4)  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    with numpy_seeded(7):
        inside = np.random.normal(size=4)  # noqa: NPY002
    np.testing.assert_array_equal(np.random.normal(size=4), expected)  # noqa: NPY002
    with numpy_seeded(7):
        np.testing.assert_array_equal(np.random.normal(size=4), inside)  # noqa: NPY002
    assert not np.array_equal(inside, expected)


def test_fixed_clipping_on_the_server_is_flowers_own_wrapper():
    """With equal weights, the full cohort and no 0-dimensional parameter."""
    names = ("w", "b")
    start = {name: sent()[name] for name in names}
    some = updates([0.3, 3.0, 6.0])
    config = configured("server_fixed", cohort=3, privacy__noise_multiplier=0.5)
    mine = create_strategy(config, names)
    mine.instructions(1, start, ConfigRecord())
    after = mine.aggregate(1, start, some)
    mean = FedAvg(min_train_nodes=1, min_evaluate_nodes=0, min_available_nodes=1)
    wrapper = DifferentialPrivacyServerSideFixedClipping(mean, 0.5, 1.0, 3)
    theirs = FlowerStrategy(wrapper, names)
    theirs.instructions(1, start, ConfigRecord())
    equal = [Update(u.partition, u.arrays, {**u.metrics, "num-examples": 1}) for u in some]
    with numpy_seeded(derive(config.seed, "privacy-noise", 1)):
        expected = theirs.aggregate(1, start, equal)
    for name in names:
        np.testing.assert_allclose(after[name], expected[name], rtol=1e-5, atol=1e-6)


# -- adaptive clipping ----------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["server_adaptive", "client_adaptive"])
@pytest.mark.parametrize("start", [0.2, 40.0])
def test_the_norm_goes_to_the_median_of_the_updates(mechanism, start):
    """Flower's own rule goes the other way; this is arXiv 1905.03871's."""
    aggregator = make(mechanism, privacy__noise_multiplier=0.0, privacy__clip_norm=start)
    norms = list(np.linspace(1.0, 5.0, 21))
    for round_ in range(1, 61):
        some = updates(norms)
        if mechanism == "client_adaptive":
            told = aggregator.training_config(round_, sent(), ConfigRecord())
            limit = float(told["clipping_norm"])
            some = [Update(u.partition, clipped_to(limit, u.arrays), u.metrics) for u in some]
        aggregated(aggregator, some, round_)
    assert aggregator.fields()["clip_norm"] == pytest.approx(3.0, abs=0.4)


def test_one_step_of_the_norm_and_the_noise_before_it():
    """C exp(-0.2 (part not clipped - 0.5)): none clipped shrinks it, all clipped raises it."""
    for norm, expected in ((0.1, np.exp(-0.1)), (9.0, np.exp(0.1))):
        aggregator = make("server_adaptive", privacy__noise_multiplier=0.0)
        aggregated(aggregator, updates([norm] * 4))
        assert aggregator.fields()["clip_norm"] == 1.0  # that of the round
        assert aggregator.state()["clip_norm"] == pytest.approx(expected)


def test_the_norm_survives_a_checkpoint():
    first = make("server_adaptive")
    aggregated(first, updates([9.0] * 20))
    second = make("server_adaptive")
    second.load_state(first.state())
    some = updates([2.0] * 20)
    np.testing.assert_array_equal(aggregated(first, some, 2)["w"], aggregated(second, some, 2)["w"])


# -- who is told what -----------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_clients_are_told_the_norm_where_they_clip(mechanism):
    told = make(mechanism).training_config(1, sent(), ConfigRecord({"a": 1}))
    norm = {"clipping_norm": 1.0} if mechanism.startswith("client_") else {}
    assert dict(told) == {"a": 1, "server-round": 1, **norm}


# -- whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["server_fixed", "client_fixed"])
def test_runs_are_reproducible_and_logged(mechanism, tmp_path):
    config = small(
        privacy__mechanism=mechanism, privacy__clip_norm=0.02, privacy__noise_multiplier=0.1
    )
    one = run(config.overlay(checkpoint__folder=str(tmp_path)))
    assert one.weights_sha256 == run(config).weights_sha256
    for line in log_of(tmp_path, "round"):
        assert line["clip_norm"] == 0.02
        assert line["noise_deviation"] == pytest.approx(0.1 * 0.02 / 3)


def test_clients_clip_what_they_send():
    limit = 0.02
    seen: list[float] = []

    def measure(round_: int, p: int, message: Message, reply: Message) -> Iterable[Message]:
        down = message.content.array_records["arrays"].to_numpy_ndarrays()
        up = reply.content.array_records["arrays"].to_numpy_ndarrays()
        squares = [float(np.square(u - d).sum()) for u, d in zip(up, down, strict=True)]
        seen.append(float(np.sqrt(sum(squares))))
        return [reply]

    run(small(privacy__mechanism="client_fixed", privacy__clip_norm=limit, rounds=1), measure)
    assert seen == pytest.approx([limit] * 3, rel=1e-3)
    seen.clear()
    run(small(privacy__mechanism="server_fixed", privacy__clip_norm=limit, rounds=1), measure)
    assert min(seen) > 2 * limit


# -- what cannot work -----------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["batch", "fbn"])
@pytest.mark.parametrize("mechanism", ["server_fixed", "client_adaptive"])
def test_shared_statistics_are_refused(normalizer, mechanism):
    config = small(
        normalizer__name=normalizer,
        privacy__mechanism=mechanism,
        privacy__noise_multiplier=0.1,
        train__batch_size=4,
        evaluation__client_fraction=0.2,
    )
    with pytest.raises(UserError, match=f"'{normalizer}' normalizer averages .* statistics"):
        run(config)


@pytest.mark.parametrize("name", ["scaffold", "fednova", "fedadam", "fedavgm", "krum"])
def test_strategies_that_take_no_plain_mean_are_refused(name):
    with pytest.raises(UserError, match=r"set strategy\.name to fedavg or fedprox"):
        create_strategy(configured("server_fixed", strategy__name=name))


def test_too_much_noise_for_the_cohort_is_refused():
    with pytest.raises(UserError, match=r"noise_multiplier = 1 needs cohort > 10, got 10"):
        create_strategy(configured("server_adaptive", cohort=10))
