from __future__ import annotations

import torch

from fedkn.layers import LayerNorm2d


def test_layer_norm_is_over_the_whole_sample() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 3) * 3 + 1
    layer = LayerNorm2d(6)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    mean = x.mean((1, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((1, 2, 3), keepdim=True)
    expected = (x - mean) / torch.sqrt(variance + 1e-5)
    expected = expected * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert not list(LayerNorm2d(6, affine=False).parameters())
