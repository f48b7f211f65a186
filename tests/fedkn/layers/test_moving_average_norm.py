from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedkn.errors import UserError
from fedkn.layers import CentredConv2d, MovingAverageNorm2d


def layer_of(channels: int, **settings: float) -> MovingAverageNorm2d:
    torch.manual_seed(1)
    layer = MovingAverageNorm2d(channels, **settings).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.running_square.uniform_(0.5, 2)
    return layer


def batches_of(sizes: tuple[int, ...], channels: int) -> list[np.ndarray]:
    """Return batches, each on a scale of its own."""
    draw = np.random.default_rng(3)
    shapes = [(size, channels, 3, 4) for size in sizes]
    return [draw.normal(size=shape) * draw.uniform(0.2, 3) + 0.5 for shape in shapes]


@pytest.mark.parametrize("warmup", [0, 2])
def test_against_the_equations_number_by_number(warmup):
    window, momentum, channels = 3, 0.3, 2
    layer = layer_of(channels, window=window, warmup=warmup, momentum=momentum)
    gamma, beta = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    running = layer.running_square.numpy().copy()
    squares: list[np.ndarray] = []
    projections: list[np.ndarray] = []
    for t, x in enumerate(batches_of((2, 4, 2, 3, 2, 2), channels), start=1):
        tensor = torch.from_numpy(x).requires_grad_()
        upstream = np.random.default_rng(t).normal(size=x.shape)
        layer.zero_grad()
        y = layer(tensor)
        y.backward(torch.from_numpy(upstream))
        squares.append((x**2).mean((0, 2, 3)))
        expected, slope = np.empty_like(x), np.empty_like(x)
        own = np.empty(channels)
        z, r, s = np.empty_like(x), np.ones(channels), np.empty(channels)
        for c in range(channels):
            s[c] = squares[-1][c] if t <= warmup else np.mean([q[c] for q in squares[-window:]])
            z[:, c] = x[:, c] / np.sqrt(s[c] + 1e-5)
            if t > warmup:
                r[c] = np.clip(np.sqrt((s[c] + 1e-5) / (running[c] + 1e-5)), 1 / 5, 5)
            expected[:, c] = gamma[c] * r[c] * z[:, c] + beta[c]
            own[c] = (r[c] * gamma[c] * upstream[:, c] * z[:, c]).mean()
            running[c] += momentum * (s[c] - running[c])
        projections.append(own)
        for c in range(channels):
            kept = projections[-window:]
            q = own[c] if t <= warmup else np.mean([p[c] for p in kept])
            g = r[c] * gamma[c] * upstream[:, c]
            slope[:, c] = (g - z[:, c] * q) / np.sqrt(s[c] + 1e-5)
        np.testing.assert_allclose(y.detach(), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(tensor.grad, slope, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.running_square, running, rtol=1e-12)
        rz = z * r[:, None, None]
        np.testing.assert_allclose(layer.weight.grad, (upstream * rz).sum((0, 2, 3)), rtol=1e-9)
    assert layer.batches.item() == 6


def test_while_it_warms_up_the_gradient_is_autograds():
    layer = layer_of(3, warmup=5)
    for x in batches_of((2, 3), 3):
        ours, plain = (torch.from_numpy(x.copy()).requires_grad_() for _ in range(2))
        square = plain.square().mean((0, 2, 3), keepdim=True)
        y = plain / torch.sqrt(square + 1e-5)
        y = y * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
        weights = torch.randn_like(ours)
        (layer(ours) * weights).sum().backward()
        (y * weights).sum().backward()
        torch.testing.assert_close(ours.grad, plain.grad)


def test_evaluation_is_on_the_running_value_and_leaves_it():
    layer = layer_of(2).eval()
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    square = layer.running_square.view(-1, 1, 1)
    expected = x / torch.sqrt(square + 1e-5) * layer.weight.view(-1, 1, 1)
    torch.testing.assert_close(layer(x), expected + layer.bias.view(-1, 1, 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.named_buffers())


def test_the_windows_are_no_part_of_a_state_and_can_be_emptied():
    layer, fresh = layer_of(2, warmup=0), layer_of(2, warmup=0)
    for x in batches_of((2, 2, 2), 2):
        layer(torch.from_numpy(x).requires_grad_()).sum().backward()
    assert set(layer.state_dict()) == {"weight", "bias", "running_square", "batches"}
    assert layer.squares.count.item() == layer.projections.count.item() == 3
    layer.forget()
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    assert torch.equal(layer(x), fresh(x))


def test_a_single_number_is_refused_in_training():
    layer = layer_of(2)
    with pytest.raises(UserError, match="erases a batch of one 1x1 map"):
        layer(torch.randn(1, 2, 1, 1, dtype=torch.float64))
    assert layer.eval()(torch.randn(1, 2, 1, 1, dtype=torch.float64)).isfinite().all()


def test_filters_are_used_without_their_mean():
    layer = CentredConv2d(4, 6, 3, padding=1, groups=2).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight = np.stack([w - w.mean() for w in layer.weight.detach().numpy()])
    expected = nn.functional.conv2d(x, torch.from_numpy(weight), layer.bias, padding=1, groups=2)
    torch.testing.assert_close(layer(x), expected)
    # A constant is a mean: nothing of it is left where no border is.
    constant = layer(torch.full((1, 4, 5, 5), 3.0, dtype=torch.float64))[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(constant, layer.bias.view(1, -1, 1, 1).expand_as(constant))
    with pytest.raises(UserError, match="a single weight zero"):
        CentredConv2d(4, 4, 1, groups=4)
