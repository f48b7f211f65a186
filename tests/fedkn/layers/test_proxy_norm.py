from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedkn import normalizers
from fedkn.layers import ProxyNorm2d


def normal() -> ProxyNorm2d:
    torch.manual_seed(0)
    layer = ProxyNorm2d(3, nn.ReLU()).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layer


def moments_of_relu(mean: float, deviation: float) -> tuple[float, float]:
    """Return mean and variance of max(X, 0), X normal: in closed form."""
    t = mean / deviation
    density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + math.erf(t / math.sqrt(2)))
    first = mean * below + deviation * density
    second = (mean**2 + deviation**2) * below + mean * deviation * density
    return first, second - first**2


def test_an_activation_is_normalized_by_what_it_makes_of_a_gaussian():
    layer = normal()
    y = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = np.empty(y.shape)
    for c in range(3):
        gamma, beta = layer.weight[c].item(), layer.bias[c].item()
        mean = gamma * layer.proxy_bias[c].item() + beta
        deviation = abs(gamma * (1 + layer.proxy_weight[c].item()))
        first, variance = moments_of_relu(mean, deviation)
        z = np.maximum(gamma * y[:, c].numpy() + beta, 0)
        expected[:, c] = (z - first) / math.sqrt(variance + 0.03)
    # What 256 numbers of a Gaussian leave out of its tails.
    np.testing.assert_allclose(layer(y).detach(), expected, atol=0.03)


def test_its_moments_are_those_of_the_quantiles_to_the_last_digits():
    from statistics import NormalDist

    layer = normal()
    y = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    at = [NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)]
    expected = np.empty(y.shape)
    for c in range(3):
        gamma, beta = layer.weight[c].item(), layer.bias[c].item()
        proxy = layer.proxy_bias[c].item() + (1 + layer.proxy_weight[c].item()) * np.array(at)
        imagined = np.maximum(gamma * proxy + beta, 0)
        z = np.maximum(gamma * y[:, c].numpy() + beta, 0)
        expected[:, c] = (z - imagined.mean()) / np.sqrt(imagined.var() + 0.03)
    np.testing.assert_allclose(layer(y).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "mish", "relu6"])
def test_it_takes_whatever_activation_the_network_has(activation):
    make = normalizers.create("proxy", groups=2)
    block = make.conv_norm(3, 4, 3, activation=activation)
    assert [type(m) for m in block] == [nn.Conv2d, nn.GroupNorm, ProxyNorm2d]
    assert not list(block.norm.parameters())
    assert [type(m) for m in make.conv_norm(3, 4, 3)] == [nn.Conv2d, nn.GroupNorm]
    assert make.conv_norm(3, 4, 3).norm.weight is not None
