"""KNConv with standardized filters."""

from __future__ import annotations

import torch

from fedkn import normalizers
from fedkn.layers import KNConv2d, WSKNConv2d


def pair(**options) -> tuple[WSKNConv2d, KNConv2d]:
    """Return the layer, and a KNConv that has the standardized weights as its own."""
    torch.manual_seed(0)
    layer = WSKNConv2d(4, 6, 3, padding=1, **options).double()
    plain = KNConv2d(4, 6, 3, padding=1, **options).double()
    with torch.no_grad():
        w = layer.weight
        mean = w.mean((1, 2, 3), keepdim=True)
        variance = ((w - mean) ** 2).mean((1, 2, 3), keepdim=True)
        plain.weight.copy_((w - mean) / (variance + 1e-5).sqrt())
        plain.bias.copy_(layer.bias.normal_())
    return layer, plain


def test_it_is_a_knconv_of_standardized_filters():
    for options in ({}, {"groups": 2}, {"stride": 2}, {"dropout_p": 0.0, "activation": "relu"}):
        layer, plain = pair(**options)
        x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
        torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


def test_gradients_go_through_the_standardization():
    layer, _ = pair(dropout_p=0.0)
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)

    def output(weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(output, (layer.weight, layer.bias))


def test_the_normalizer_uses_it_for_every_convolution():
    make = normalizers.create("ws_kernel", dropout_p=0.0)
    assert type(make.conv(3, 4, 3)) is WSKNConv2d
    block = make.conv_norm(3, 4, 3, activation="relu")
    assert [type(m) for m in block] == [WSKNConv2d]
    assert block.conv.activation == "relu"
