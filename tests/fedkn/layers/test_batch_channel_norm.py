from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedkn.layers import BatchChannelNorm2d


def layer_of(groups: int, channels: int) -> BatchChannelNorm2d:
    torch.manual_seed(1)
    layer = BatchChannelNorm2d(groups, channels, momentum=0.3).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


def naive(layer: BatchChannelNorm2d, x: np.ndarray, mean: np.ndarray, variance: np.ndarray):
    """Normalize by the estimates, then each group of channels by itself, number by number."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    z = np.empty_like(x)
    for n, c in np.ndindex(*x.shape[:2]):
        z[n, c] = weight[c] * (x[n, c] - mean[c]) / np.sqrt(variance[c] + 1e-5) + bias[c]
    each = x.shape[1] // layer.num_groups
    out = np.empty_like(x)
    for n, g in np.ndindex(x.shape[0], layer.num_groups):
        part = z[n, g * each : (g + 1) * each]
        scaled = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
        scale, shift = layer.group_weight[g].item(), layer.group_bias[g].item()
        out[n, g * each : (g + 1) * each] = scale * scaled + shift
    return out


def test_estimates_move_first_by_the_distance_from_where_they_were():
    layer = layer_of(2, 6)
    mean, variance = layer.running_mean.numpy().copy(), layer.running_var.numpy().copy()
    for examples in (1, 3):
        x = np.random.default_rng(examples).normal(size=(examples, 6, 3, 4)) * 2 + 1
        y = layer(torch.from_numpy(x))
        for c in range(6):
            spread = ((x[:, c] - mean[c]) ** 2).mean()
            mean[c] += 0.3 * (x[:, c].mean() - mean[c])
            variance[c] += 0.3 * (spread - variance[c])
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12)
        np.testing.assert_allclose(layer.running_var, variance, rtol=1e-12)
        np.testing.assert_allclose(y.detach(), naive(layer, x, mean, variance), rtol=1e-9)


def test_evaluation_leaves_the_estimates():
    layer = layer_of(3, 6).eval()
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    before = layer.running_mean.clone()
    expected = naive(layer, x.numpy(), layer.running_mean.numpy(), layer.running_var.numpy())
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-9)
    assert torch.equal(layer.running_mean, before)


def test_the_estimates_are_constants_to_the_gradient():
    layer = layer_of(2, 4)
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    (layer(x) * weights).sum().backward()
    frozen = layer.eval()  # the estimates that training left
    again = x.detach().clone().requires_grad_()
    (frozen(again) * weights).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


def test_a_second_batch_does_not_disturb_the_first_ones_gradient():
    layer = layer_of(2, 4)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    first = layer(x).square().sum()
    layer(x + 1)
    first.backward()
    assert layer.weight.grad is not None
