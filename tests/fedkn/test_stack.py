"""Tensors end to end: what is asked of a stack is what each client's arrays would answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.averaging import summed, weighted_mean, weighted_sum
from fedkn.stack import Flat, Layout, Stack, distances

SHAPES = {
    "conv.weight": (3, 2, 2),
    "norm.weight": (3,),
    "norm.mean": (3,),
    "count": (),
    "gain": (1,),
    "one": (1, 1),
    "fc.weight": (2, 3),
    "nothing": (0, 4),
}
PARAMETERS = ("conv.weight", "norm.weight", "gain", "fc.weight", "nothing")


def states(clients: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(clients):
        state = {n: np.asarray(random.normal(size=s), np.float32) for n, s in SHAPES.items()}
        state["conv.weight"][0] = -0.0
        state["count"] = np.asarray(random.integers(9), np.int64)
        found.append(state)
    return found


def stack_of(some: list[dict[str, np.ndarray]]) -> Stack:
    return Stack.of(Layout(some[0], PARAMETERS), some)


def test_what_goes_in_comes_out_read_only():
    some = states(3)
    for row, state in zip(stack_of(some).rows(), some, strict=True):
        assert list(row) == list(state)
        for name, value in state.items():
            assert (row[name].dtype, row[name].shape) == (value.dtype, value.shape)
            assert row[name].tobytes() == value.tobytes()
            assert not row[name].flags.writeable


def test_parameters_lie_together_whatever_lies_between_them():
    layout = Layout(states(1)[0], PARAMETERS)
    (run,) = layout.runs(PARAMETERS)
    assert run.names == PARAMETERS
    assert len(layout.runs(SHAPES)) == len(layout.kinds) == 3
    assert [run.names for run in layout.runs(["conv.weight", "gain"])] == [
        ("conv.weight",),
        ("gain",),
    ]


def test_a_flat_state_is_a_copy_both_ways():
    tensors = {n: torch.from_numpy(v) for n, v in states(1)[0].items()}
    turned = {**tensors, "conv.weight": tensors["conv.weight"].permute(2, 0, 1).contiguous()}
    turned["conv.weight"] = turned["conv.weight"].permute(1, 2, 0)
    layout = Layout(tensors, PARAMETERS)
    flat = Flat.of(layout, turned)
    assert flat is not None
    own = flat.tensors()
    again = flat.tensors()
    for name, value in tensors.items():
        assert torch.equal(own[name], value)
        own[name].add_(1)
        assert torch.equal(again[name], value)
    value = tensors["fc.weight"].clone()
    tensors["fc.weight"].add_(1)
    assert torch.equal(flat.tensors()["fc.weight"], value)


@pytest.mark.parametrize(
    "change",
    [
        {"fc.weight": torch.zeros(3, 2)},
        {"fc.weight": torch.zeros(2, 3, dtype=torch.float64)},
        {"more": torch.zeros(1)},
    ],
)
def test_tensors_that_do_not_fit_are_no_flat_state(change):
    tensors = {n: torch.from_numpy(v) for n, v in states(1)[0].items()}
    layout = Layout(tensors)
    assert Flat.of(layout, tensors | change) is None
    assert Flat.of(layout, {n: v for n, v in tensors.items() if n != "gain"}) is None


@settings(max_examples=30, deadline=None)
@given(clients=st.sampled_from([1, 2, 3, 7, 8, 9, 10, 17, 130, 300]), seed=st.integers(0, 1000))
def test_sums_over_clients_are_numpys_to_the_bit(clients, seed):
    some = states(clients, seed)
    random = np.random.default_rng(seed)
    weights = random.random(clients).tolist()
    rows = stack_of(some).rows()
    sent = states(1, seed + 1)[0]
    ours = weighted_sum(rows, weights, SHAPES)
    steps = summed(rows, SHAPES, lambda i, end, start: (start - end.double()) / (i + 1), sent)
    assert set(ours) == set(steps) == set(SHAPES)
    for name in SHAPES:
        ends = [state[name].astype(np.float64) for state in some]
        theirs = np.sum([end * w for end, w in zip(ends, weights, strict=True)], axis=0)
        assert (ours[name].shape, ours[name].tobytes()) == (theirs.shape, theirs.tobytes())
        moves = [(sent[name].astype(np.float64) - end) / (i + 1) for i, end in enumerate(ends)]
        assert steps[name].tobytes() == np.sum(moves, axis=0).tobytes()


def test_rows_of_several_stacks_and_arrays_beside_them_have_one_mean():
    some = states(7)
    first, second = stack_of(some[:4]).rows(), stack_of(some[4:]).rows()
    examples = [5, 40, 3, 22, 1, 9, 13]
    expected = weighted_mean(some, examples, PARAMETERS)
    for mixed in (first + second, [*first, *some[4:]], [*reversed(second), *first]):
        weights = [examples[_place(row, some)] for row in mixed]
        mean = weighted_mean(mixed, weights, PARAMETERS)
        assert list(mean) == list(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(mean[name], value, rtol=1e-5, atol=1e-6)
    again = weighted_mean(first + second, examples, PARAMETERS)
    assert all(again[name].tobytes() == expected[name].tobytes() for name in expected)


def _place(row, some) -> int:
    return next(
        i for i, state in enumerate(some) if np.array_equal(state["fc.weight"], row["fc.weight"])
    )


def test_distances_are_euclidean_in_float64():
    some, sent = states(5), states(1, 9)[0]
    some[2]["fc.weight"][0] = 1e25  # whose square is beyond float32
    sent["norm.weight"][:] = 1e8
    for names in (PARAMETERS, ["norm.mean", "count"], list(SHAPES)):
        naive = [
            np.sqrt(sum(((s[n].astype(np.float64) - sent[n]) ** 2).sum() for n in names))
            for s in some
        ]
        assert distances(stack_of(some).rows(), sent, names) == pytest.approx(naive, rel=1e-12)
    assert distances([], sent, PARAMETERS) == []
    assert distances(some, sent, []) == [0.0] * 5


def test_clients_are_counted_where_nothing_travels():
    stack = Stack.of(Layout({}), [{}, {}])
    assert len(stack) == len(stack.rows()) == 2
    assert weighted_mean(stack.rows(), [1, 1], []) == {}
