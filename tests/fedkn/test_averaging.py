from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.averaging import moment_pairs, pool_moments, weighted_mean, weighted_sum
from fedkn.errors import UserError
from fedkn.normalizers import TensorRole

PAIRS = [("norm.mean", "norm.variance")]


def moments(values, dtype=np.float64):
    return {"norm.mean": values.mean(1).astype(dtype), "norm.variance": values.var(1).astype(dtype)}


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    momentum=st.sampled_from([1.0, 0.1]),
    seed=st.integers(0, 1000),
)
def test_pooled_moments_are_those_of_the_union(sizes, momentum, seed):
    random = np.random.default_rng(seed)
    clients = [random.normal(random.normal(0, 5), 2, (3, n)) for n in sizes]
    sent = moments(random.normal(0, 1, (3, 4)))
    pooled = pool_moments(PAIRS, sent, [moments(c) for c in clients], sizes, momentum)
    union = moments(np.concatenate(clients, axis=1))
    for name, value in union.items():
        expected = sent[name] + momentum * (value - sent[name])
        np.testing.assert_allclose(pooled[name], expected, rtol=1e-9, atol=1e-9)


def test_one_client_and_momentum_1_give_the_clients_own_moments_to_the_bit():
    random = np.random.default_rng(0)
    own = moments(random.normal(3, 2, (4, 7)), np.float32)
    sent = moments(random.normal(0, 1, (4, 7)), np.float32)
    pooled = pool_moments(PAIRS, sent, [own], [17], 1.0)
    assert all(np.array_equal(pooled[k], own[k]) for k in own)
    assert all(v.dtype == np.float32 for v in pooled.values())


def test_means_that_differ_add_to_the_variance():
    updates = [{"norm.mean": np.array([m]), "norm.variance": np.array([1.0])} for m in (-2.0, 2.0)]
    pooled = pool_moments(PAIRS, updates[0], updates, [5, 5], 1.0)
    assert (pooled["norm.mean"], pooled["norm.variance"]) == (0.0, 5.0)


def test_what_a_dtype_cannot_hold_is_infinite_and_silent():
    update = {k: np.full(1, 3e38, np.float32) for k in PAIRS[0]}
    other = {**update, "norm.mean": np.full(1, -3e38, np.float32)}
    pooled = pool_moments(PAIRS, update, [update, other], [1, 1], 1.0)
    assert np.isinf(pooled["norm.variance"])


def test_pairs_are_found_by_their_module():
    rule = {
        "mean": TensorRole.MEAN,
        "a.weight": TensorRole.SHARED,
        "a.running_mean": TensorRole.MEAN,
        "variance": TensorRole.VARIANCE,
        "a.running_var": TensorRole.VARIANCE,
        "a.b.running_var": TensorRole.SHARED,
    }
    assert moment_pairs(rule) == [("mean", "variance"), ("a.running_mean", "a.running_var")]
    assert moment_pairs({"w": TensorRole.SHARED}) == []


@pytest.mark.parametrize(
    "rule",
    [
        {"a.mean": TensorRole.MEAN},
        {"a.variance": TensorRole.VARIANCE, "b.mean": TensorRole.MEAN},
        {"a.m": TensorRole.MEAN, "a.n": TensorRole.MEAN, "a.v": TensorRole.VARIANCE},
    ],
)
def test_the_unpaired_are_refused_by_name(rule):
    with pytest.raises(UserError, match="module 'a' has"):
        moment_pairs(rule)


@settings(deadline=None, max_examples=40)
@given(
    examples=st.lists(st.integers(1, 999), min_size=1, max_size=6),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 1000),
)
def test_the_mean_is_that_of_flowers_fedavg_to_the_bit(examples, dtype, seed):
    random = np.random.default_rng(seed)
    shapes = {"weight": (3, 4, 2), "scale": ()}
    states = [
        {name: np.asarray(random.normal(size=shape), dtype) for name, shape in shapes.items()}
        for _ in examples
    ]
    # What is exactly zero keeps its sign, which a sum that begins with zero loses.
    states[0]["weight"][0] = -0.0
    replies = [
        RecordDict(
            {
                "arrays": ArrayRecord({name: Array(value) for name, value in state.items()}),
                "metrics": MetricRecord({"num-examples": count}),
            }
        )
        for state, count in zip(states, examples, strict=True)
    ]
    theirs = aggregate_arrayrecords(replies, "num-examples")
    ours = weighted_mean(states, examples, shapes)
    for name in shapes:
        value = theirs[name].numpy().astype(dtype)
        assert (ours[name].shape, ours[name].tobytes()) == (value.shape, value.tobytes())


def test_a_weighted_sum_is_in_float64():
    states = [{"a": np.full(3, value, np.float32)} for value in (1e8, 1.0)]
    total = weighted_sum(states, [1.0, 1.0], ["a"])["a"]
    assert total.dtype == np.float64
    assert total.tolist() == [100000001.0] * 3
