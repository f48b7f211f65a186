from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.layers.max_pool import max_pool, serves
from fedkn.layers.native import library


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    if not library.load():
        pytest.skip("the fused CPU kernels cannot be built here")


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(1, 3),
    channels=st.integers(1, 40),
    height=st.integers(2, 9),
    width=st.integers(2, 40),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    seed=st.integers(0, 9),
)
def test_values_and_gradients_are_pytorchs_to_the_bit_ties_and_odd_sides_included(  # noqa: PLR0917
    samples, channels, height, width, layout, seed
):
    draw = torch.Generator().manual_seed(seed)
    # Few different numbers, so that most windows hold their largest several times.
    x = torch.randint(-2, 3, (samples, channels, height, width), generator=draw).float()
    x = x.contiguous(memory_format=layout).requires_grad_()
    assert serves(x)
    y, expected = max_pool(x), F.max_pool2d(x, 2)
    assert torch.equal(y, expected)
    g = torch.randn(y.shape, generator=draw)
    (got,) = torch.autograd.grad(y, x, g)
    assert torch.equal(got, torch.autograd.grad(expected, x, g)[0])
    assert got.is_contiguous(memory_format=layout)
    with torch.no_grad():
        assert torch.equal(max_pool(x), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_nan_wins_as_in_pytorch(layout):
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, 0] = x[1, :, 3, 5] = x[1, 0, 2, 4] = torch.nan
    x = x.contiguous(memory_format=layout)
    torch.testing.assert_close(max_pool(x), F.max_pool2d(x, 2), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_gradients_are_those_of_autograd(layout):
    x = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for pool in (max_pool, lambda x: F.max_pool2d(x, 2)):
        leaf = x.contiguous(memory_format=layout).requires_grad_()
        (first,) = torch.autograd.grad(pool(leaf * leaf).sin().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0])
    torch.testing.assert_close(*found)


def test_where_the_kernel_does_not_serve_it_is_pytorchs_own():
    x = torch.randn(2, 3, 8, 8)
    for other in (x.double(), x.half(), x[:0], x.expand(2, 3, 8, 8).transpose(2, 3)):
        assert not serves(other)
        assert torch.equal(max_pool(other), F.max_pool2d(other, 2))
    per_client = torch.func.vmap(max_pool)(x.expand(4, *x.shape))
    assert torch.equal(per_client[3], F.max_pool2d(x, 2))
    with library.switched_off():
        assert not serves(x)


def test_derivatives_forward_are_pytorchs():
    x, tangent = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    found = []
    for pool in (max_pool, lambda x: F.max_pool2d(x, 2)):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            found.append(torch.autograd.forward_ad.unpack_dual(pool(dual)).tangent)
    assert torch.equal(*found)
