from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.layers.group_norm import group_norm, pools, serves
from fedkn.layers.native import library


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    if not library.load():
        pytest.skip("the fused CPU kernels cannot be built here")


def _drawn(shape, mean=0.0, layout=torch.channels_last):
    draw = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=draw) + mean).contiguous(memory_format=layout)
    weight, bias = (torch.randn(shape[1], generator=draw) for _ in range(2))
    g = torch.randn((*shape[:2], shape[2] // 2, shape[3] // 2), generator=draw)
    return x, weight, bias, g.contiguous(memory_format=layout)


def group_norm_pool(x, groups, weight, bias, eps, relu):  # noqa: PLR0917 - as group_norm
    return group_norm(x, groups, weight, bias, eps, relu, pool=True)


def _definition(x, groups, weight, bias, eps, relu):  # noqa: PLR0917 - as group_norm
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.max_pool2d(F.relu(y) if relu else y, 2)


@settings(deadline=None, max_examples=40)
@given(
    samples=st.integers(1, 3),
    channels=st.sampled_from([8, 16, 24, 40, 64]),
    groups=st.sampled_from([1, 2, 4, 8]),
    height=st.integers(1, 6),
    width=st.integers(1, 10),
    relu=st.booleans(),
    mean=st.sampled_from([0.0, 10.0, 1000.0]),
)
def test_output_and_gradients_are_those_of_the_definition(  # noqa: PLR0917 - hypothesis names them
    samples, channels, groups, height, width, relu, mean
):
    x, weight, bias, g = _drawn((samples, channels, 2 * height, 2 * width), mean)
    assert serves(x, weight, bias)
    assert pools(x)
    results = []
    for function, dtype in (
        (group_norm_pool, torch.float32),
        (_definition, torch.float32),
        (_definition, torch.float64),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves[:1], groups, *leaves[1:], 1e-5, relu)
        results.append((y, *torch.autograd.grad(y, leaves, g.to(dtype))))
    for fused, other, expected in zip(*results, strict=True):
        # Where two numbers of a window are the same to rounding, another one may win than in
        # float64; in float32 it is the same one.
        numbers = channels // groups * height * width
        limit = max(1e-5 * max(1.0, 32 / numbers), _error(other, expected))
        assert _error(fused, expected) <= limit or _error(fused, other) <= limit


def _error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


def test_of_equal_numbers_the_first_gets_the_gradient_and_none_where_relu_made_them_zero():
    x = torch.ones(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    x[:, :, 2:] = -1.0
    weight, bias, g = torch.ones(8), torch.zeros(8), torch.ones(1, 8, 2, 2)
    results = []
    for function in (group_norm_pool, _definition):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(function(leaf, 2, weight, bias, 1e-5, True), leaf, g)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients_are_those_of_autograd():
    x, weight, bias, g = _drawn((2, 8, 4, 6))
    results = []
    for function in (group_norm_pool, _definition):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = function(leaves[0], 4, leaves[1], leaves[2], 1e-5, True)
        first = torch.autograd.grad(y, leaves, g, create_graph=True)
        results.append(torch.autograd.grad(sum(f.square().sum() for f in first), leaves[:2]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_fixed_input_gets_no_gradient_and_gain_and_shift_theirs():
    x, weight, bias, g = _drawn((2, 8, 4, 4))
    found = []
    # PyTorch's own crashes in channels last where the input's gradient is not wanted.
    for function, given_x in ((group_norm_pool, x), (_definition, x.contiguous())):
        leaves = [t.clone().requires_grad_() for t in (weight, bias)]
        function(given_x, 4, *leaves, 1e-5, True).backward(g)
        found.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_nan_is_passed_on():
    x, weight, bias, _ = _drawn((2, 8, 4, 4))
    x[1, 3, 2, 1] = torch.nan
    got, expected = (f(x, 4, weight, bias, 1e-5, True) for f in (group_norm_pool, _definition))
    assert torch.equal(got.isnan(), expected.isnan())


def test_the_number_of_threads_does_not_change_a_bit():
    x, weight, bias, g = _drawn((5, 16, 8, 8))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y = group_norm_pool(leaves[0], 4, leaves[1], leaves[2], 1e-5, True)
            found.append((y, *torch.autograd.grad(y, leaves, g)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [(2, 12, 4, 4), (2, 8, 5, 4), (2, 8, 4, 7)])
def test_it_pools_even_sides_and_channels_in_eights_channels_last(shape):
    assert not pools(torch.randn(shape).contiguous(memory_format=torch.channels_last))
    assert not pools(torch.randn(2, 8, 4, 4))
