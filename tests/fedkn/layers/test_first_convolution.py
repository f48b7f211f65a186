from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.layers.first_convolution import first_convolution, serves
from fedkn.layers.native import library
from tests.fedkn.layers.plain_convolutions import maps, plain_layer


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    if not library.load():
        pytest.skip("the fused CPU kernels cannot be built here")


def _layer(channels=3, filters=16, **options):
    return plain_layer(channels, filters, **options)


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(1, 3),
    channels=st.integers(1, 4),
    filters=st.sampled_from([8, 16, 24, 32, 48]),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
)
def test_outputs_and_gradients_are_those_of_the_definition(
    samples, channels, filters, height, width
):
    torch.manual_seed(filters)
    layer, x = _layer(channels, filters), maps(samples, channels, height, width)
    assert serves(layer, x)
    g = maps(samples, filters, height, width)
    y = first_convolution(layer, x)
    (dw,) = torch.autograd.grad(y, layer.weight, g)
    exact = layer.weight.detach().double().requires_grad_()
    expected = torch.conv2d(x.double(), exact, None, 1, 1)
    (expected_dw,) = torch.autograd.grad(expected, exact, g.double())
    assert y.is_contiguous(memory_format=torch.channels_last)
    for mine, wanted in ((y, expected), (dw, expected_dw)):
        assert ((mine - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)).item() < 1e-5


def test_gradients_of_gradients_are_those_of_autograd():
    layer, x = _layer(), maps(2, 3, 5, 6)
    found = []
    for forward in (first_convolution, lambda layer, x: layer(x)):
        (first,) = torch.autograd.grad(
            forward(layer, x).square().sum(), layer.weight, create_graph=True
        )
        found.append(torch.autograd.grad(first.square().sum(), layer.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-2)


def test_the_number_of_threads_does_not_change_a_bit():
    layer, x = _layer(), maps(5, 3, 8, 8)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = first_convolution(layer, x)
            found.append((y, *torch.autograd.grad(y.square().sum(), layer.weight)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 5},
        {"filters": 12},
        {"stride": 2},
        {"padding": 0},
        {"padding": 2, "dilation": 2},
        {"kernel_size": 1, "padding": 0},
        {"channels": 2, "groups": 2},
        {"padding_mode": "reflect"},
    ],
)
def test_it_serves_no_other_layers(options):
    layer = _layer(**options)
    assert not serves(layer, maps(2, layer.in_channels, 6, 6))


def test_it_serves_no_othermaps():
    layer, x = _layer(), maps(2, 3, 6, 6)
    assert serves(layer, x)
    others = (
        x.contiguous(),
        x.double(),
        x[:0],
        x[0],
        maps(2, 4, 6, 6),
        x.clone().requires_grad_(),
    )
    assert not any(serves(layer, other) for other in others)
    with torch.autocast("cpu"):
        assert not serves(layer, x)
    with library.switched_off():
        assert not serves(layer, x)
