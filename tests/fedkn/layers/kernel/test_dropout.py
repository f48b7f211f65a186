from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from fedkn.errors import UserError
from fedkn.layers import KNConv2d, dropout_stream
from fedkn.layers.kernel import dropout
from fedkn.layers.kernel.dropout import (
    LEVELS,
    Stream,
    drop_level,
    dropout_keys,
    keep_mask,
    keep_mask_and_bits,
    key_number,
    keys_of,
    mask_of_bits,
    next_key,
    next_number,
)

CPU = torch.device("cpu")


def mask(seed: int, shape=(16, 8, 32, 32), p=0.05, calls=1) -> torch.Tensor:
    with dropout_stream(seed):
        for _ in range(calls):
            key = next_key(CPU)
    return keep_mask(key, torch.Size(shape), drop_level(p), torch.float32, CPU)


def splitmix64(seed: int, count: int) -> list[int]:
    """The reference implementation by Vigna (splitmix64.c), in Python's integers."""
    word, out = 2**64 - 1, []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & word
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        out.append(z ^ (z >> 31))
    return out


def test_words_are_splitmix64() -> None:
    # First output for the state 1234567, as published with the algorithm.
    assert splitmix64(1234567, 1) == [6457827717110365317]
    level = drop_level(0.3)
    lanes = np.array(splitmix64(1234567, 5), dtype=np.uint64).view(np.int16)
    expected = torch.from_numpy((lanes >= level - LEVELS // 2).astype(np.float32))
    actual = keep_mask(1234567, torch.Size((1, 19)), level, torch.float32, CPU)
    assert torch.equal(actual[0], expected[:19])


@pytest.mark.parametrize("p", [0.01, 0.05, 0.25, 0.5])
def test_rate_by_seed_call_lane_and_place(p) -> None:
    exact = drop_level(p) / LEVELS
    draws = torch.stack([1 - mask(seed, p=p, calls=call) for seed in range(8) for call in (1, 2)])
    for grouped in (
        draws.flatten(1),  # per seed and call
        draws.flatten().view(-1, 4).T,  # per lane
        draws.transpose(0, 1).flatten(1),  # per sample
        draws.permute(3, 0, 1, 2, 4).flatten(1),  # per row
        draws.permute(4, 0, 1, 2, 3).flatten(1),  # per column
    ):
        count = grouped.shape[1]
        z = (grouped.sum(1) - count * exact) / (count * exact * (1 - exact)) ** 0.5
        assert z.abs().max().item() < 4.5


def test_dropped_runs_are_geometric() -> None:
    keep = mask(11, shape=(64, 8, 32, 32), p=0.25).flatten().numpy()
    gaps = np.diff(np.flatnonzero(keep == 0)) - 1
    counts = np.bincount(np.minimum(gaps, 15), minlength=16)
    q = 1 - drop_level(0.25) / LEVELS
    expected = np.array([(1 - q) * q**k for k in range(15)] + [q**15]) * len(gaps)
    assert stats.chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 5, 32, 1024, 8192])
def test_neighbours_are_independent(distance) -> None:
    drop = 1 - mask(5, shape=(64, 8, 32, 32), p=0.25).flatten()
    drop = drop - drop.mean()
    z = (drop[:-distance] * drop[distance:]).mean() / drop.var() * len(drop) ** 0.5
    assert abs(z.item()) < 4.5


def test_streams_of_near_seeds_and_calls_are_independent() -> None:
    masks = torch.stack(
        [1 - mask(seed, calls=c).flatten() for seed in (0, 1, 2, -1) for c in (1, 2, 3)]
    )
    correlation = torch.corrcoef(masks) - torch.eye(len(masks))
    assert correlation.abs().max().item() * masks.shape[1] ** 0.5 < 4.5


def test_number_and_tensor_keys_agree() -> None:
    for seed in (0, 7, -3, 2**63 - 1, 2**62 + 12345):
        with dropout_stream(seed):
            keys = [int(next_key(CPU)) for _ in range(3)]
        with dropout_stream(torch.tensor(seed)):
            assert [next_number() for _ in range(3)] == keys
        assert len(set(keys)) == 3


class Launches(TorchDispatchMode):
    """Counts operations, but for views, and is not asked what it makes of them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        self.count += not function.is_view
        return function(*arguments, **(settings or {}))


@pytest.fixture
def gpu(monkeypatch):
    """The CPU as if work went to a stream of a GPU: its number, and whether it is recorded."""
    state = SimpleNamespace(stream=7, capturing=False)
    monkeypatch.setattr(dropout, "_stream_of", lambda _: state.stream)
    monkeypatch.setattr(dropout, "_capturing", lambda: state.capturing)
    monkeypatch.setattr(Stream, "on_host", False)
    return state


def keys_one_by_one(seed, first=1, count=3):
    return [key_number(seed, call) for call in range(first, first + count)]


def test_on_a_gpu_keys_are_computed_many_at_once(gpu, monkeypatch):
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    with dropout_stream(torch.tensor(5)) as stream, Launches() as launches:
        first = stream.key(CPU, eager=True)
        once = launches.count
        keys = [first, *(stream.key(CPU, eager=True) for _ in range(63))]
        assert launches.count == once < 20
        more = [stream.key(CPU, eager=True) for _ in range(10)]
        assert launches.count == 2 * once
    assert [int(key) for key in (*keys, *more)] == keys_one_by_one(5, count=74)


def test_keys_of_a_seed_that_changes_in_place_change_with_it(gpu):
    seed = torch.tensor(5)
    with dropout_stream(seed) as stream:
        before = [int(stream.key(CPU, eager=True)) for _ in range(3)]
        seed.add_(1)
        after = [int(stream.key(CPU, eager=True)) for _ in range(3)]
    assert before + after == keys_one_by_one(5) + keys_one_by_one(6, first=4)


def test_another_cuda_stream_does_not_take_what_the_first_computes(gpu):
    with dropout_stream(torch.tensor(5)) as stream:
        stream.key(CPU, eager=True)
        first = stream._ahead
        gpu.stream = 8
        stream.key(CPU, eager=True)
        assert stream._ahead is not first
        assert int(stream.key(CPU, eager=True)) == key_number(5, 3)


@pytest.mark.parametrize("within", [True, False])
def test_a_graph_computes_the_keys_that_it_is_replayed_with(gpu, monkeypatch, within):
    """A stream opened outside is read in the graph; one opened within computes many there."""
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    gpu.capturing = within
    with dropout_stream(torch.tensor(5)) as stream:
        if not within:
            stream.key(CPU, eager=True)
        gpu.capturing = True
        before = stream._ahead
        with Launches() as launches:
            keys = [int(stream.key(CPU, eager=True)) for _ in range(3)]
            assert (launches.count < 20) == within
        assert keys == keys_one_by_one(5, first=1 if within else 2)
        assert (stream._ahead is before) != within
        gpu.capturing = False
        if within:
            with Launches() as launches:
                assert int(stream.key(CPU, eager=True)) == key_number(5, 4)
                assert launches.count > 10


def test_keys_computed_under_a_mode_or_of_an_inference_tensor_are_not_kept(gpu):
    with torch.inference_mode():
        seed = torch.tensor(5)
    with dropout_stream(seed) as stream:
        assert int(stream.key(CPU, eager=True)) == key_number(5, 1)
        assert stream._ahead is None
    with dropout_stream(torch.tensor(5)) as stream:
        with Launches():
            assert int(stream.key(CPU, eager=True)) == key_number(5, 1)
        assert stream._ahead is None
        assert int(stream.key(CPU, eager=False)) == key_number(5, 2)
        assert stream._ahead is None


def test_a_sample_does_not_depend_on_the_batch_behind_it() -> None:
    assert torch.equal(mask(3, shape=(2, 3, 5, 7)), mask(3, shape=(4, 3, 5, 7))[:2])


def test_streams_replay_nest_and_end() -> None:
    layer, x = KNConv2d(3, 4, 3, dropout_p=0.2), torch.randn(2, 3, 6, 6)
    with dropout_stream(1):
        first, second = layer(x), layer(x)
    with dropout_stream(1):
        again = layer(x)
        with dropout_stream(2):
            other = layer(x)
        after = layer(x)
    assert torch.equal(first, again)
    assert torch.equal(second, after)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_outside_a_stream_torch_manual_seed_rules() -> None:
    layer, x = KNConv2d(3, 4, 3, dropout_p=0.2), torch.randn(2, 3, 6, 6)
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("seed", [1.5, torch.tensor(1.5), "1"])
def test_a_seed_is_an_integer(seed) -> None:
    with pytest.raises(UserError, match="seed"), dropout_stream(seed):
        pass


def test_evaluation_is_deterministic_and_expected_variance_is_the_mean_of_the_draws() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 16, 5, 5, dtype=torch.float64) + 1
    layer = KNConv2d(16, 4, 5, dropout_p=0.2, bias=False, dtype=torch.float64, eps=0.0)
    weight = torch.zeros_like(layer.weight)
    weight[0, 0, 0, 0] = 1.0
    layer.weight.data = weight
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    # With S = sum(w) = 1 the output is (x0 - mean) / deviation: its inverse square, at the true
    # mean, is the variance over a known constant.
    constant = (x[0, 0, 0, 0] - x.mean()) ** 2
    expected = constant / layer(x)[0, 0, 0, 0] ** 2
    draws = torch.stack(
        [
            (kept * x / (1 - drop_level(0.2) / LEVELS)).var(correction=0)
            for kept in (mask(s, shape=x.shape, p=0.2).double() for s in range(2000))
        ]
    )
    error = (draws.mean() - expected) / (draws.std() / len(draws) ** 0.5)
    assert abs(error.item()) < 4


def test_lanes_are_the_same_without_a_view(monkeypatch):
    key = torch.tensor(-(2**62) + 12345)
    shape = torch.Size((3, 5, 7, 9))
    drawn = keep_mask(key, shape, 9000, torch.float32, CPU)
    monkeypatch.setattr(dropout, "_VIEWS", False)
    again = keep_mask(key, shape, 9000, torch.float32, CPU)
    assert torch.equal(drawn, again)
    keys = torch.tensor([1, -5, 2**40])
    together = torch.func.vmap(lambda key: keep_mask(key, shape, 9000, torch.float32, CPU))(keys)
    for own, key in zip(together, keys, strict=True):
        assert torch.equal(own, keep_mask(key, shape, 9000, torch.float32, CPU))


def test_keys_drawn_beforehand_are_those_of_the_stream():
    seeds = torch.tensor([[3, -4], [2**62, 0]])
    keys = keys_of(seeds, 5)
    assert keys.shape == (2, 2, 5)
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        with dropout_stream(int(seeds[place])) as stream:
            taken = [next_number() for _ in range(5)]
        assert stream.calls == 5
        assert keys[place].tolist() == taken
        with dropout_keys(keys[place]):
            assert [int(next_key(CPU)) for _ in range(2)] == taken[:2]
            assert next_number() == taken[2]


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 4, 8, 8), (0, 2, 3, 3), (5, 33, 67, 31)]
)
def test_a_mask_comes_back_from_its_bits(shape) -> None:
    size = torch.Size(shape)
    mask, bits = keep_mask_and_bits(-7, size, 20000, torch.float32)
    assert torch.equal(mask, keep_mask(-7, size, 20000, torch.float32, CPU))
    assert torch.equal(mask_of_bits(bits, size, torch.float32), mask)
    assert bits.nbytes <= mask.numel() / 8 + 2 * shape[0] + 1
