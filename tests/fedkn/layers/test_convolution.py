from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedkn.layers import first_convolution as images
from fedkn.layers import winograd as by_winograd
from fedkn.layers.convolution import convolve, convolve_by_kernels
from fedkn.layers.native import library
from tests.fedkn.layers.plain_convolutions import maps, plain_layer


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    if not library.load():
        pytest.skip("the fused CPU kernels cannot be built here")


def _close(found, exact):
    for mine, wanted in zip(found, exact, strict=True):
        scale = wanted.abs().max().clamp(min=1.0)
        assert ((mine - wanted).abs().max() / scale).item() < 1e-5


def _passes(y, wanted):
    g = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).remainder(7) - 3
    return (y, *torch.autograd.grad(y, wanted, g))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(
        st.integers(1, 3), st.sampled_from([1, 3, 5, 8, 16]), st.integers(1, 9), st.integers(1, 9)
    ),
    filters=st.sampled_from([8, 12, 16, 48]),
    bias=st.booleans(),
    stride=st.sampled_from([1, 2]),
    frozen=st.booleans(),
)
def test_it_is_the_layers_convolution_whichever_kernel_serves(shape, filters, bias, stride, frozen):
    torch.manual_seed(filters)
    layer = plain_layer(shape[1], filters, bias=bias, stride=stride)
    x = maps(*shape)
    exact = copy.deepcopy(layer).double()
    before = x.clone().requires_grad_(not frozen)
    own = [*([] if frozen else [before]), *layer.parameters()]
    mine = _passes(convolve(layer, before, layer.weight, layer.bias), own)
    wanted = x.double().requires_grad_(not frozen)
    theirs = [*([] if frozen else [wanted]), *exact.parameters()]
    _close(mine, _passes(exact(wanted), theirs))


def test_a_sample_without_its_dimension_and_other_filters_are_taken():
    layer, x = plain_layer(8, 16, bias=True), maps(2, 8, 6, 6)
    other = torch.randn_like(layer.weight)
    exact = torch.conv2d(x.double(), other.double(), layer.bias.double(), 1, 1)
    _close([convolve(layer, x, other, layer.bias)], [exact])
    _close([convolve(layer, x[0], other, layer.bias)], [exact[0]])


class _Scaled(nn.Conv2d):
    """Somebody's layer that makes its filters, as many libraries write it."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * 2, self.bias)


class _Own(nn.Conv2d):
    """Somebody's layer that convolves in a way of its own."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) + 1


def _network():
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        _Scaled(16, 24, 3, padding=1),
        _Own(24, 8, 3, padding=1),
        nn.Conv2d(8, 8, 1),
    )
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def _by_hand(network, x):
    for layer in network:
        weight = layer.weight * 2 if isinstance(layer, _Scaled) else getattr(layer, "weight", None)
        if isinstance(layer, nn.ReLU):
            x = x.relu()
        elif isinstance(layer, _Own) or layer.kernel_size == (1, 1):
            x = layer(x)
        elif images.serves(layer, x):
            x = images.first_convolution(layer, x, weight) + layer.bias.view(-1, 1, 1)
        elif by_winograd.serves(layer, x):
            x = by_winograd.winograd(layer, x, weight)
            x = x if layer.bias is None else x + layer.bias.view(-1, 1, 1)
        else:
            x = layer(x)
    return x


def test_anybodys_network_convolves_so_and_stays_what_it_is():
    network, x = _network(), maps(2, 3, 8, 8)
    before, kinds = network(x), [type(layer) for layer in network]
    names = list(network.state_dict())
    convolve_by_kernels(network)
    convolve_by_kernels(network)
    assert torch.equal(network(x), _by_hand(network, x))
    if by_winograd.serves(network[2], maps(2, 16, 8, 8)):
        assert not torch.equal(network(x), before)
    _close([network(x)], [_network().double()(x.double())])
    assert [type(layer) for layer in network] == kinds
    assert list(network.state_dict()) == names


def test_hooks_see_what_these_layers_do():
    network, x = _network(), maps(2, 3, 8, 8)
    convolve_by_kernels(network)
    plain, seen = network(x), []
    network[2].register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    assert torch.equal(network(x), plain)
    assert seen[0][1].shape == (2, 16, 8, 8)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_a_copy_convolves_by_its_own_weights(copied):
    network, x = _network(), maps(2, 3, 8, 8)
    convolve_by_kernels(network)
    other = copied(network)
    expected = network(x).clone()
    with torch.no_grad():
        network[2].weight.zero_()
    assert torch.allclose(other(x), expected, atol=1e-5)
    assert not torch.allclose(network(x), expected, atol=1e-5)


def test_a_network_is_freed_without_the_garbage_collector():
    network = _network()
    convolve_by_kernels(network)
    weight = weakref.ref(network[0].weight)
    gc.disable()
    try:
        del network
        assert weight() is None
    finally:
        gc.enable()


def test_exported_compiled_and_transformed_networks_are_pytorchs():
    network, x = _network(), maps(2, 3, 8, 8)
    plain = network(x)
    convolve_by_kernels(network)
    program = torch.export.export(network, (x,))
    assert not [n for n in program.graph.nodes if "fedkn" in str(n.target)]
    torch.testing.assert_close(program.module()(x), plain)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain)
    values = dict(network.named_parameters())
    stacked = torch.func.vmap(lambda y: torch.func.functional_call(network, values, y))(x[None])
    torch.testing.assert_close(stacked[0], plain)
