"""Online normalization against its equations, sample by sample in NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedkn.layers import OnlineNorm2d

FORWARD, BACKWARD, EPS = 0.9, 0.8, 1e-5


def layer_in_state(channels: int) -> OnlineNorm2d:
    torch.manual_seed(0)
    layer = OnlineNorm2d(channels, forward_decay=FORWARD, backward_decay=BACKWARD).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    layer.control_mean.normal_()
    layer.control_projection.normal_()
    return layer


class Naive:
    """One channel, as the paper writes it."""

    def __init__(self, layer: OnlineNorm2d, channel: int) -> None:
        self.m = layer.running_mean[channel].item()
        self.v = layer.running_var[channel].item()
        self.p = layer.control_mean[channel].item()
        self.q = layer.control_projection[channel].item()

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        scale = np.sqrt(self.v + EPS)
        y = (x - self.m) / scale
        away = x.mean() - self.m
        self.v = FORWARD * self.v + (1 - FORWARD) * x.var() + FORWARD * (1 - FORWARD) * away**2
        self.m = FORWARD * self.m + (1 - FORWARD) * x.mean()
        return y, scale

    def backward(self, gradient: np.ndarray, y: np.ndarray, scale: float) -> np.ndarray:
        along = gradient - (1 - BACKWARD) * self.q * y
        self.q += (along * y).mean()
        result = along / scale - (1 - BACKWARD) * self.p
        self.p += result.mean()
        return result


def test_forward_and_backward_are_the_papers_for_two_batches():
    layer = layer_in_state(2)
    channels = [Naive(layer, c) for c in range(2)]
    for examples in (3, 2):
        x = torch.randn(examples, 2, 3, 4, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(examples, 2, 3, 4, dtype=torch.float64)
        normalized = np.empty(x.shape)
        scales = np.empty((examples, 2))
        for n, c in np.ndindex(examples, 2):
            normalized[n, c], scales[n, c] = channels[c].forward(x[n, c].detach().numpy())
        # Scale, bias and layer scaling, whose gradient is autograd's.
        y = torch.from_numpy(normalized).requires_grad_()
        z = y * layer.weight.detach().view(-1, 1, 1) + layer.bias.detach().view(-1, 1, 1)
        expected = z / (z.square().mean((1, 2, 3), keepdim=True) + EPS).sqrt()
        (expected * weights).sum().backward()

        out = layer(x)
        torch.testing.assert_close(out, expected.detach(), rtol=1e-10, atol=1e-12)
        (out * weights).sum().backward()
        assert y.grad is not None
        gradient = np.empty(x.shape)
        for n, c in np.ndindex(examples, 2):
            own = y.grad[n, c].numpy()
            gradient[n, c] = channels[c].backward(own, normalized[n, c], scales[n, c])
        np.testing.assert_allclose(x.grad, gradient, rtol=1e-9, atol=1e-12)
        for name, values in (
            ("running_mean", [c.m for c in channels]),
            ("running_var", [c.v for c in channels]),
            ("control_mean", [c.p for c in channels]),
            ("control_projection", [c.q for c in channels]),
        ):
            np.testing.assert_allclose(getattr(layer, name), values, rtol=1e-9, err_msg=name)


def test_a_batch_is_its_examples_one_after_another():
    torch.manual_seed(3)
    whole, single = layer_in_state(3), layer_in_state(3)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    one_by_one = torch.cat([single(part) for part in x.split(1)])
    torch.testing.assert_close(whole(x), one_by_one)
    torch.testing.assert_close(whole.running_var, single.running_var)


def test_evaluation_moves_nothing():
    layer = layer_in_state(2).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
