from __future__ import annotations

import torch

from fedkn.layers import WSConv2d


def test_weight_standardization_ignores_scale_and_offset_of_a_filter() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 6)
    layer = WSConv2d(4, 6, 3, stride=2, padding=1, groups=2)
    before = layer(x)
    filters = layer.weight.detach()
    mean = filters.mean((1, 2, 3), keepdim=True)
    deviation = (((filters - mean) ** 2).mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    plain = torch.nn.functional.conv2d(
        x, (filters - mean) / deviation, layer.bias, stride=2, padding=1, groups=2
    )
    torch.testing.assert_close(before, plain, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.weight.mul_(100.0).add_(7.0)
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3)
