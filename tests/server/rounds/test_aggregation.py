from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.normalizers import FederationRule, TensorRole
from server.checkpoints import Checkpoint, CheckpointStore
from server.gate.screening import Update
from server.rounds.aggregation import Aggregator, NoAggregate
from server.rounds.participation import begin
from server.strategies.registry import create_strategy, names

pytestmark = pytest.mark.usefixtures("server_process")

ROLES = {
    "conv.weight": TensorRole.SHARED,
    "temperature": TensorRole.SHARED,
    "norm.mean": TensorRole.SHARED,
    "norm.var": TensorRole.SHARED,
    "norm.count": TensorRole.COUNTER,
    "old.mean": TensorRole.FROZEN,
    "fc.weight": TensorRole.SHARED,
}
RULE = FederationRule(ROLES)
PARAMETERS = ("conv.weight", "temperature", "fc.weight")
BUFFERS = ("norm.mean", "norm.var")
EXAMPLES = (10, 40, 25, 5, 20)


def configured(name: str, **changes) -> ExperimentConfig:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return ExperimentConfig.resolve({"strategy.name": name, **dotted})


def tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {
        "conv.weight": (3, 2, 2, 2),
        "temperature": (),
        "norm.mean": (3,),
        "norm.var": (3,),
        "old.mean": (3,),
        "fc.weight": (4, 3),
    }
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    values = {name: np.asarray(value) for name, value in values.items()}
    values["norm.var"] = np.abs(values["norm.var"])
    return values


def updates(round_: int, scale: float = 1.0) -> list[Update]:
    return [
        Update(
            partition,
            {
                n: np.asarray(v * scale, v.dtype)
                for n, v in tensors(100 * round_ + partition).items()
            },
            {"num-examples": examples, "train-loss": 0.5 + partition, "steps": 1 + partition},
        )
        for partition, examples in enumerate(EXAMPLES)
    ]


def make(config: ExperimentConfig) -> Aggregator:
    return Aggregator(config, lambda round_: RULE, PARAMETERS)


def play(aggregator: Aggregator, current, rounds) -> dict[str, np.ndarray]:
    for round_ in rounds:
        aggregator.training_config(round_, current, ConfigRecord())
        current = aggregator.aggregate(round_, current, updates(round_))
    return current


def mean(round_: int, name: str) -> np.ndarray:
    """The average by examples, in double precision."""
    stack = [update.arrays[name].astype(np.float64) for update in updates(round_)]
    return np.average(stack, axis=0, weights=EXAMPLES)


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_fedavg_is_the_mean_by_examples(name):
    sent = tensors(0)
    after = play(make(configured(name)), sent, [1])
    for tensor in (*PARAMETERS, *BUFFERS):
        np.testing.assert_allclose(after[tensor], mean(1, tensor), rtol=1e-5, atol=1e-7)


def test_frozen_tensors_stay_the_servers():
    sent = tensors(0)
    np.testing.assert_array_equal(
        play(make(configured("fedavg")), sent, [1])["old.mean"], sent["old.mean"]
    )


@pytest.mark.parametrize("name", names())
def test_every_strategy_keeps_order_shape_dtype_and_averages_buffers(name):
    sent = tensors(0)
    after = play(make(configured(name)), sent, range(1, 5))
    assert list(after) == list(sent)
    for tensor, value in after.items():
        assert (value.dtype, value.shape) == (sent[tensor].dtype, sent[tensor].shape)
        assert np.isfinite(value).all()
    for tensor in BUFFERS:
        np.testing.assert_allclose(after[tensor], mean(4, tensor), rtol=1e-5, atol=1e-7)
    assert (after["norm.var"] >= 0).all()
    assert any(not np.array_equal(after[tensor], sent[tensor]) for tensor in PARAMETERS)


@pytest.mark.parametrize(
    ("momentum", "rate"), [(0.9, "default"), (0.5, 0.3)], ids=["default", "other"]
)
def test_fedavgm_closed_form(momentum, rate):
    """arXiv 1909.06335, Eq. 3: v <- beta v + d, w <- w - eta v, d = w - mean."""
    config = configured(
        "fedavgm", strategy__server_momentum=momentum, strategy__server_learning_rate=rate
    )
    after = play(make(config), tensors(0), range(1, 5))
    for name in PARAMETERS:
        w, v = tensors(0)[name].astype(np.float64), 0.0
        for round_ in range(1, 5):
            v = momentum * v + (w - mean(round_, name))
            w = w - (1.0 if rate == "default" else rate) * v
        np.testing.assert_allclose(after[name], w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_strategies_closed_form(name):
    """arXiv 2003.00295, Algorithm 2; FedAdam with Adam's bias correction, as Flower has it."""
    eta, tau = 0.05, 1e-2
    config = configured(name, strategy__server_learning_rate=eta, strategy__tau=tau)
    after = play(make(config), tensors(0), range(1, 5))
    beta_1, beta_2 = (0.0, 0.0) if name == "fedadagrad" else (0.9, 0.99)
    for tensor in PARAMETERS:
        w = tensors(0)[tensor].astype(np.float64)
        m, v = np.zeros_like(w), np.zeros_like(w)
        for round_ in range(1, 5):
            d = mean(round_, tensor) - w
            m = beta_1 * m + (1 - beta_1) * d
            step = eta
            if name == "fedadam":
                v = beta_2 * v + (1 - beta_2) * d**2
                step *= (1 - beta_2 ** (round_ + 1)) ** 0.5 / (1 - beta_1 ** (round_ + 1))
            elif name == "fedyogi":
                v = v - (1 - beta_2) * d**2 * np.sign(v - d**2)
            else:
                v = v + d**2
            w = w + step * m / (np.sqrt(v) + tau)
        np.testing.assert_allclose(after[tensor], w, rtol=2e-3, atol=1e-4)


def test_fedmedian_and_trimmed_mean_closed_form():
    median = play(make(configured("fedmedian")), tensors(0), [1])
    trimmed = play(make(configured("fedtrimmedavg", strategy__trim=0.2)), tensors(0), [1])
    for name in PARAMETERS:
        stack = np.sort([update.arrays[name].astype(np.float64) for update in updates(1)], axis=0)
        np.testing.assert_allclose(median[name], stack[2], rtol=1e-6)
        np.testing.assert_allclose(trimmed[name], stack[1:4].mean(0), rtol=1e-5, atol=1e-6)


def test_qfedavg_without_fairness_is_the_plain_mean():
    after = play(make(configured("qfedavg", strategy__q=0.0)), tensors(0), [1])
    for name in PARAMETERS:
        stack = [update.arrays[name].astype(np.float64) for update in updates(1)]
        np.testing.assert_allclose(after[name], np.mean(stack, axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["krum", "multikrum", "fedmedian", "fedtrimmedavg"])
def test_robust_strategies_shrug_off_a_distant_update(name):
    config = configured(name, strategy__malicious_clients=1)
    aggregator = make(config)
    sent = tensors(0)
    aggregator.training_config(1, sent, ConfigRecord())
    spoiled = updates(1)
    for tensor in PARAMETERS:
        spoiled[1].arrays[tensor] = np.asarray(spoiled[1].arrays[tensor] + 1e6, np.float32)
    after = aggregator.aggregate(1, sent, spoiled)
    assert all(np.abs(after[tensor]).max() < 10 for tensor in PARAMETERS)


def test_krum_returns_one_of_the_updates():
    after = play(make(configured("krum")), tensors(0), [1])
    chosen = [
        all(np.array_equal(after[name], update.arrays[name]) for name in PARAMETERS)
        for update in updates(1)
    ]
    assert sum(chosen) == 1


@pytest.mark.parametrize("name", names())
def test_the_strategys_state_survives_a_checkpoint(name, tmp_path):
    config = configured(name)
    undisturbed = play(make(config), tensors(0), range(1, 6))
    first = make(config)
    current = play(first, tensors(0), [1, 2])
    store = CheckpointStore(tmp_path, 2, config.flat())
    store.save(Checkpoint(2, current, first.state(), begin(1)))
    restored = store.load_newest()
    assert restored is not None
    second = make(config)
    second.load_state(restored.strategy)
    resumed = play(second, restored.tensors, range(3, 6))
    for tensor, value in undisturbed.items():
        np.testing.assert_array_equal(resumed[tensor], value)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad", "fedavgm"])
def test_the_strategy_sees_the_parameters_alone(name):
    aggregator = make(configured(name))
    play(aggregator, tensors(0), [1, 2])
    numbers = sum(tensors(0)[parameter].size for parameter in PARAMETERS)
    assert aggregator.state()
    assert all(value.shape == (numbers,) for value in aggregator.state().values())


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad", "qfedavg"])
def test_updates_that_overflow_leave_the_strategy_as_it_was(name):
    """One finite update of 1e30 would leave an infinite second moment behind, for ever.

    q-FedAvg, which sums in float64, overflows by a loss whose square does.
    """
    config = configured(name, strategy__q=2.0)
    clean = play(make(config), tensors(0), [1, 2, 4])
    aggregator = make(config)
    current = play(aggregator, tensors(0), [1, 2])
    aggregator.training_config(3, current, ConfigRecord())
    huge = updates(3, scale=1e30)
    huge[0].metrics["train-loss"] = 1e300
    with pytest.raises(NoAggregate, match="overflow"):
        aggregator.aggregate(3, current, huge)
    after = play(aggregator, current, [4])
    for tensor, value in clean.items():
        np.testing.assert_array_equal(after[tensor], value)


def test_too_few_updates_for_bulyan_keep_everything():
    config = configured("bulyan", cohort=7, strategy__malicious_clients=1)
    aggregator = make(config)
    sent = tensors(0)
    aggregator.training_config(1, sent, ConfigRecord())
    with pytest.raises(NoAggregate, match="5 updates are too few"):
        aggregator.aggregate(1, sent, updates(1))


@pytest.mark.parametrize(
    ("name", "malicious", "needed"), [("krum", 2, 7), ("multikrum", 3, 9), ("bulyan", 1, 7)]
)
def test_a_cohort_too_small_for_the_promise_is_refused(name, malicious, needed):
    config = configured(name, strategy__malicious_clients=malicious, cohort=needed - 1)
    with pytest.raises(UserError, match=f"needs cohort >= {needed}"):
        create_strategy(config)
    create_strategy(config.overlay(cohort=needed))


def test_an_unknown_strategy_names_the_nearest():
    with pytest.raises(UserError, match="unknown strategy 'fedadm': did you mean 'fedadam'"):
        create_strategy(configured("fedadm"))


def test_what_the_clients_are_told():
    given = ConfigRecord({"server-round": 3, "learning-rate": 0.1})
    told = make(configured("fedprox", strategy__proximal_mu=0.25)).training_config(
        3, tensors(0), given
    )
    assert dict(told) == {"server-round": 3, "learning-rate": 0.1, "proximal-mu": 0.25}
    plain = ConfigRecord({"server-round": 3, "learning-rate": 0.1})
    assert "proximal-mu" not in make(configured("fedavg")).training_config(3, tensors(0), plain)


def test_a_model_without_parameters_on_the_wire_still_averages_its_buffers():
    rule = FederationRule(dict.fromkeys(BUFFERS, TensorRole.SHARED))
    aggregator = Aggregator(configured("fedavg"), lambda round_: rule, ())
    sent = {name: tensors(0)[name] for name in rule}
    aggregator.training_config(1, sent, ConfigRecord())
    after = aggregator.aggregate(1, sent, updates(1))
    np.testing.assert_allclose(after["norm.var"], mean(1, "norm.var"), rtol=1e-5)


def test_means_and_variances_are_pooled_with_the_rules_weight():
    roles = ROLES | {"norm.mean": TensorRole.MEAN, "norm.var": TensorRole.VARIANCE}
    rule = FederationRule(roles, pooling_weight=0.25)
    sent = tensors(0)
    after = play(Aggregator(configured("fedavg"), lambda round_: rule, PARAMETERS), sent, [1])
    shares = np.asarray(EXAMPLES, np.float64)[:, None] / sum(EXAMPLES)
    means, variances = (np.stack([u.arrays[n].astype(float) for u in updates(1)]) for n in BUFFERS)
    second = (shares * (variances + means**2)).sum(0)
    pooled = {"norm.mean": mean(1, "norm.mean"), "norm.var": second - mean(1, "norm.mean") ** 2}
    for name in BUFFERS:
        expected = 0.75 * sent[name] + 0.25 * pooled[name]
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-7)


def test_an_optimizers_state_of_an_older_version_is_refused_not_dropped():
    aggregator = make(configured("fedadam"))
    with pytest.raises(UserError, match="older version"):
        aggregator.load_state({"m_t/w": np.zeros(3, np.float32)})
