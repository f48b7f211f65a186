from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.layers.fixup import ShiftedConv2d
from fedkn.layers.moving_average_norm import CentredConv2d
from fedkn.layers.native import library
from fedkn.layers.scaled_ws_conv import ScaledWSConv2d
from fedkn.layers.winograd import serves, winograd
from fedkn.layers.ws_conv import WSConv2d
from tests.fedkn.layers.plain_convolutions import maps, plain_layer

NARROW, WIDE = 8, 16
EIGHTS = st.sampled_from([8, 16, 24, 32, 40, 64])


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    if not library.load():
        pytest.skip("the fused CPU kernels cannot be built here")
    if not _most_lanes():
        pytest.skip("this processor has no vectors for them")


def _layer(channels=16, filters=24, **options):
    return plain_layer(channels, filters, **options)


def _passes(x, weight, g, convolve):
    """Return the output and the gradients of x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = convolve(x, weight)
    return (y, *torch.autograd.grad(y, (x, weight), g))


def _plain(x, weight):
    return torch.conv2d(x, weight, None, 1, 1)


def _by(lanes):
    return lambda x, weight: torch.ops.fedkn_native.winograd(x, weight, lanes)


def _most_lanes():
    return torch.ops.fedkn_native.winograd_lanes([8, 8, 8, 8], 8)


def _levels():
    return [n for n in (NARROW, WIDE) if n <= _most_lanes()]


def _errors(found, exact):
    return [
        ((one - other).abs().max() / other.abs().max().clamp(min=1e-3)).item()
        for one, other in zip(found, exact, strict=True)
    ]


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(1, 4),
    channels=EIGHTS,
    filters=EIGHTS,
    sides=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    last=st.booleans(),
)
def test_outputs_and_gradients_are_those_of_the_definition(samples, channels, filters, sides, last):
    torch.manual_seed(filters)
    layer, x = _layer(channels, filters), maps(samples, channels, *sides)
    if not last:
        layer = layer.to(memory_format=torch.contiguous_format)
    assert serves(layer, x) == (samples * -(-sides[0] // 2) * -(-sides[1] // 2) >= 8)
    weight, g = layer.weight.detach(), maps(samples, filters, *sides)
    exact = _passes(x.double(), weight.double(), g.double(), _plain)
    by_level = [_passes(x, weight, g, _by(lanes)) for lanes in _levels()]
    for found in by_level:
        assert max(_errors(found, exact)) < 4e-6
        assert found[0].is_contiguous(memory_format=torch.channels_last)
    # Whatever the vectors, numbers are added up in one order.
    for other in by_level[1:]:
        assert all(map(torch.equal, by_level[0], other))
    if serves(layer, x):
        assert torch.equal(winograd(layer, x), by_level[-1][0])


@pytest.mark.parametrize("shape", [(8, 32, 64, 16), (8, 64, 64, 8), (2, 16, 16, 32)])
def test_errors_are_a_small_multiple_of_those_of_pytorchs_convolutions(shape):
    samples, channels, filters, side = shape
    x, g = maps(samples, channels, side, side), maps(samples, filters, side, side)
    weight = _layer(channels, filters).weight.detach()
    exact = _passes(x.double(), weight.double(), g.double(), _plain)

    def errors(convolve):
        found = _passes(x, weight, g, convolve)
        return [(a - b).square().mean().sqrt().item() for a, b in zip(found, exact, strict=True)]

    mine, theirs = errors(_by(_levels()[-1])), errors(_plain)
    assert all(one < 4 * other for one, other in zip(mine, theirs, strict=True))


def test_one_weight_at_one_pixel_reaches_its_neighbour_alone():
    layer = _layer(8, 8)
    x = torch.zeros(1, 8, 7, 6).contiguous(memory_format=torch.channels_last)
    x[0, 3, 4, 2] = 1.0
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[5, 3, 0, 2] = 2.0  # one row up, one column to the right
    expected = torch.zeros(1, 8, 7, 6)
    expected[0, 5, 5, 1] = 2.0
    assert torch.equal(winograd(layer, x), expected)


def test_gradients_nobody_wants_are_not_computed():
    x, weight, g = maps(2, 8, 6, 6), _layer(8, 16).weight.detach(), maps(2, 16, 6, 6)
    backward = torch.ops.fedkn_native.winograd_backward
    for wanted in ([True, False], [False, True], [False, False]):
        found = backward(g, x, weight, _levels()[-1], wanted)
        assert [each is not None for each in found] == wanted


def test_gradients_of_gradients_are_those_of_autograd():
    layer, x = _layer(8, 8), maps(2, 8, 5, 6).requires_grad_()
    found = []
    for forward in (winograd, lambda layer, x: layer(x)):
        first = torch.autograd.grad(
            forward(layer, x).square().sum(), (x, layer.weight), create_graph=True
        )
        total = sum(gradient.square().sum() for gradient in first)
        found.append(torch.autograd.grad(total, (x, layer.weight)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


def test_the_number_of_threads_does_not_change_a_bit():
    # Enough tiles that the filters' gradient is a sum of several parts.
    x, weight, g = maps(9, 8, 32, 32), _layer(8, 16).weight, maps(9, 16, 32, 32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(_passes(x, weight, g, _by(_levels()[-1])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def _by_weight_standardization(weight):
    variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) / (variance + 1e-5).sqrt()


def _by_scaled_weight_standardization(weight):
    variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) / (variance * weight[0].numel()).clamp(min=1e-4).sqrt()


@pytest.mark.parametrize(
    ("kind", "used"),
    [
        (WSConv2d, _by_weight_standardization),
        (ScaledWSConv2d, _by_scaled_weight_standardization),
        (CentredConv2d, lambda weight: weight - weight.mean((1, 2, 3), keepdim=True)),
        (ShiftedConv2d, lambda weight: weight),
    ],
)
def test_layers_that_make_their_filters_convolve_so_too(kind, used):
    torch.manual_seed(3)
    layer = kind(16, 24, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    x, g = maps(2, 16, 10, 9), maps(2, 24, 10, 9)
    exact = _passes(
        x.double(), layer.weight.double(), g.double(), lambda x, weight: _plain(x, used(weight))
    )
    found = []
    for kernels in (True, False):
        with contextlib.nullcontext() if kernels else library.switched_off():
            y = layer(x.requires_grad_())
            found.append((y, *torch.autograd.grad(y, (x, layer.weight), g)))
    for one in found:
        assert max(_errors(one, exact)) < 1e-5
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize(
    "options",
    [
        {"channels": 12},
        {"filters": 20},
        {"channels": 136},
        {"filters": 136},
        {"stride": 2},
        {"padding": 0},
        {"padding": 2, "dilation": 2},
        {"kernel_size": 1, "padding": 0},
        {"groups": 2},
        {"padding_mode": "reflect"},
    ],
)
def test_it_serves_no_other_layers(options):
    layer = _layer(**options)
    assert not serves(layer, maps(2, layer.in_channels, 6, 6))


def test_it_serves_no_othermaps():
    layer, x = _layer(), maps(2, 16, 6, 6)
    assert serves(layer, x)
    assert serves(layer, x.clone().requires_grad_())
    for other in (x.contiguous(), x.double(), x[:0], x[0], maps(2, 8, 6, 6), maps(1, 16, 4, 6)):
        assert not serves(layer, other)
    with torch.autocast("cpu"):
        assert not serves(layer, x)
    with library.switched_off():
        assert not serves(layer, x)
