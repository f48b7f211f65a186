from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedkn.errors import UserError
from fedkn.layers import GhostBatchNorm2d


def normal(layer: GhostBatchNorm2d) -> GhostBatchNorm2d:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.double()


@pytest.mark.parametrize(
    ("examples", "parts"),
    [(2, [2]), (3, [3]), (4, [2, 2]), (5, [2, 3]), (8, [2, 2, 2, 2])],
)
def test_each_ghost_batch_is_normalized_by_itself(examples, parts):
    torch.manual_seed(0)
    layer = normal(GhostBatchNorm2d(3, 2))
    x = torch.randn(examples, 3, 4, 5, dtype=torch.float64)
    mean, variance, begin = np.zeros(3), np.ones(3), 0
    out = np.empty(x.shape)
    for size in parts:
        for c in range(3):
            values = x[begin : begin + size, c].numpy()
            scaled = (values - values.mean()) / np.sqrt(values.var() + 1e-5)
            out[begin : begin + size, c] = layer.weight[c].item() * scaled + layer.bias[c].item()
            mean[c] += 0.1 * (values.mean() - mean[c])
            variance[c] += 0.1 * (values.var(ddof=1) - variance[c])
        begin += size
    torch.testing.assert_close(layer(x), torch.from_numpy(out), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, variance, rtol=1e-12)


def test_with_ghosts_as_large_as_the_batch_it_is_batch_norm():
    torch.manual_seed(0)
    layer, plain = GhostBatchNorm2d(3, 8), nn.BatchNorm2d(3)
    for _ in range(3):
        x = torch.randn(6, 3, 4, 4) * 2 + 1
        torch.testing.assert_close(layer(x), plain(x))
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


def test_one_example_is_refused_in_training():
    layer = GhostBatchNorm2d(3, 2)
    with pytest.raises(UserError, match="a batch of one example"):
        layer(torch.randn(1, 3, 4, 4))
    assert layer.eval()(torch.randn(1, 3, 4, 4)).shape == (1, 3, 4, 4)
