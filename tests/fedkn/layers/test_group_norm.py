from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.layers.group_norm import group_norm, serves
from fedkn.layers.native import library


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    if not library.load():
        pytest.skip("the fused CPU kernels cannot be built here")


def _drawn(shape, mean=0.0, layout=torch.channels_last):
    draw = torch.Generator().manual_seed(sum(shape))
    x, g = (torch.randn(shape, generator=draw) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=draw) for _ in range(2))
    last = {"memory_format": layout}
    return (x + mean).contiguous(**last), weight, bias, g.contiguous(**last)


def _definition(x, groups, weight, bias, eps, relu):  # noqa: PLR0917 - as group_norm
    parts = x.reshape(len(x), groups, -1)
    mean = parts.mean(2, keepdim=True)
    variance = (parts - mean).square().mean(2, keepdim=True)
    y = ((parts - mean) / (variance + eps).sqrt()).view(x.shape)
    y = y * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    return y.clamp(min=0) if relu else y


@settings(deadline=None, max_examples=40)
@given(
    samples=st.integers(1, 4),
    groups=st.integers(1, 5),
    each=st.integers(1, 20),
    height=st.integers(1, 9),
    width=st.integers(2, 40),
    relu=st.booleans(),
    mean=st.sampled_from([0.0, 10.0]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_output_and_gradients_are_those_of_the_definition(  # noqa: PLR0917 - hypothesis names them
    samples, groups, each, height, width, relu, mean, layout
):
    x, weight, bias, g = _drawn((samples, groups * each, height, width), mean, layout)
    assert serves(x, weight, bias)
    results = []
    for function, dtype in (
        (group_norm, torch.float32),
        (_pytorch, torch.float32),
        (_definition, torch.float64),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves[:1], groups, *leaves[1:], 1e-5, relu)
        results.append((y, *torch.autograd.grad(y, leaves, g.to(dtype))))
    for fused, other, expected in zip(*results, strict=True):
        # Groups of a few numbers may be nearly equal, and then are ill-conditioned for anybody.
        numbers = each * height * width
        limit = max(1e-5 * max(1.0, 32 / numbers), _error(other, expected))
        assert _error(fused, expected) <= limit


def _pytorch(x, groups, weight, bias, eps, relu):  # noqa: PLR0917 - as group_norm
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.relu(y) if relu else y


def _error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_gradients_are_those_of_autograd(layout):
    x, weight, bias, g = _drawn((2, 8, 3, 4), layout=layout)
    results = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        if fused:
            y = group_norm(leaves[0], 4, leaves[1], leaves[2], 1e-5, True)
        else:
            y = F.relu(F.group_norm(leaves[0], 4, leaves[1], leaves[2], 1e-5))
        first = torch.autograd.grad(y, leaves, g, create_graph=True)
        results.append(torch.autograd.grad(sum(f.square().sum() for f in first), leaves[:2]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_fixed_input_or_gain_gets_no_gradient_and_the_others_theirs(layout):
    x, weight, bias, g = _drawn((2, 8, 3, 4), layout=layout)
    group_norm(x, 4, weight, bias.requires_grad_(), 1e-5, False).backward(g)
    torch.testing.assert_close(bias.grad, g.sum((0, 2, 3)))
    assert x.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_number_of_threads_does_not_change_a_bit(layout):
    x, weight, bias, g = _drawn((5, 16, 8, 8), layout=layout)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = group_norm(leaves[0], 4, leaves[1], leaves[2], 1e-5, True)
            found.append((y, *torch.autograd.grad(y, leaves, g)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_it_serves_nothing_else():
    x, weight, bias, _ = _drawn((2, 8, 3, 4))
    assert serves(x, weight, bias)
    assert serves(x.contiguous(), weight, bias)
    assert not serves(x.transpose(2, 3), weight, bias)
    assert not serves(x.double(), weight.double(), bias.double())
    assert not serves(x[:0], weight, bias)
    assert not serves(x, None, None)
    with library.switched_off():
        assert not serves(x, weight, bias)
    with torch.autocast("cpu"):
        assert not serves(x, weight, bias)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sums_over_large_maps_lose_no_digits(layout):
    x, weight, bias, g = _drawn((1, 4, 192, 192), 3.0, layout)
    g = g + 1.0  # so that the sums are far larger than what is left of them
    found = []
    for function, dtype in ((group_norm, torch.float32), (_definition, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = function(leaves[0], 2, leaves[1], leaves[2], 1e-5, True)
        found.append(torch.autograd.grad(y, leaves, g.to(dtype)))
    for mine, expected in zip(*found, strict=True):
        assert ((mine - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pool", [False, True])
def test_gains_and_shifts_may_lie_anyhow_in_memory(layout, pool):
    x, weight, bias, _ = _drawn((2, 8, 4, 4), layout=layout)
    strided = torch.stack((weight, bias), 1)[:, 0]
    expanded = torch.full((1,), 0.5).expand(8)
    pool = pool and layout == torch.channels_last
    mine = group_norm(x, 4, strided, expanded, 1e-5, False, pool)
    expected = F.group_norm(x, 4, weight, torch.full((8,), 0.5))
    torch.testing.assert_close(mine, F.max_pool2d(expected, 2) if pool else expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pool", [False, True])
def test_gradients_that_are_differentiable_where_a_norm_is_applied_twice(layout, pool):
    x, weight, bias, _ = _drawn((2, 8, 4, 4), layout=layout)
    pool = pool and layout == torch.channels_last
    found = []
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = leaves[0]
        for again in (False, True):
            if ours:
                y = group_norm(y, 4, leaves[1], leaves[2], 1e-5, True, pool and again)
            else:
                y = F.relu(F.group_norm(y, 4, leaves[1], leaves[2], 1e-5))
                y = F.max_pool2d(y, 2) if pool and again else y
        found.append(torch.autograd.grad(y.square().sum(), leaves, create_graph=True))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_nan_reaches_the_gradients_as_in_pytorch(layout):
    x, weight, bias, g = _drawn((2, 8, 3, 4), layout=layout)
    x[1, 3, 2, 1] = torch.nan
    found = []
    for function in (group_norm, _pytorch):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        found.append(
            torch.autograd.grad(function(leaves[0], 4, *leaves[1:], 1e-5, True), leaves, g)
        )
    for mine, expected in zip(*found, strict=True):
        assert torch.equal(mine.isnan(), expected.isnan())
