"""FedProx's client half: the gradient of its term, laid out flat and stacked over clients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkn.algorithms.fedprox import FedProx
from fedkn.config import TrainConfig
from fedkn.errors import UserError
from fedkn.training import FlatSGD, LocalTask
from tests.fedkn.training.test_optimizer import batches, network

TASK = LocalTask(0, 1, 0, TrainConfig(), 0.1)


@pytest.mark.parametrize("mu", [0.01, 3.0])
def test_the_proximal_term_is_the_gradient_of_its_formula(mu):
    model, rule = network(), FedProx(mu)
    optimizer = FlatSGD(model)
    anchor = optimizer.values + torch.randn(
        optimizer.values.shape, generator=torch.Generator().manual_seed(1)
    )
    (x, y), *_ = batches(1)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    rule.gradient(optimizer.values, optimizer.gradients, anchor)
    w = torch.cat([p.reshape(-1) for p in optimizer.parameters])
    loss = nn.functional.cross_entropy(model(x), y) + mu / 2 * (w - anchor).square().sum()
    expected = torch.autograd.grad(loss, optimizer.parameters)
    for parameter, gradient in zip(optimizer.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_stacked_it_is_each_clients_own():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 2), (3, 5)]
    values, began, gradients = (
        [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)
    )
    expected = [g + 0.3 * (v - b) for g, v, b in zip(gradients, values, began, strict=True)]
    FedProx(0.3).stacked(values, gradients, began)
    for mine, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_it_holds_clients_to_the_values_that_were_loaded():
    optimizer = FlatSGD(network())
    (anchor,) = FedProx(0.5).begin(optimizer, TASK)
    assert torch.equal(anchor, optimizer.values)
    optimizer.values.add_(1.0)
    assert not torch.equal(anchor, optimizer.values)


def test_the_weight_is_what_the_server_tells():
    assert FedProx.of({"proximal-mu": 0.25}, {}).mu == 0.25
    silent = FedProx.of({}, {})
    assert not silent.acts
    assert silent.begin(FlatSGD(network()), TASK) == ()
    with pytest.raises(UserError, match="no float 'proximal-mu'"):
        FedProx.of({"proximal-mu": "much"}, {})
