"""KNConv under vmap over clients: the native kernels do what a loop over the clients does."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from fedkn.layers import KNConv2d, dropout_stream
from fedkn.layers.kernel.backends import cpp
from fedkn.layers.native import library
from tests.fedkn.layers.paths import path

CLIENTS = 3
SETTINGS = [
    {},
    {"activation": "relu"},
    {"keeps_output": True, "stride": 2},
    {"bias": False, "padding": (1, 0, 2, 1)},
    {"groups": 2, "dilation": (1, 2)},
    {"dropout_p": 0.0},
    {"dropout_p": 0.0, "groups": 2},
]


def stacked(layer: nn.Module, dim: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.stack(
            [p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for _ in range(CLIENTS)],
            dim,
        ).requires_grad_()
        for name, p in layer.named_parameters()
    }


def images() -> torch.Tensor:
    return torch.randn(CLIENTS, 2, 8, 9, 7, generator=torch.Generator().manual_seed(1)) + 0.3


def forward(layer: nn.Module):
    def run(parameters, x, seed):
        with dropout_stream(seed):
            return functional_call(layer, parameters, x)

    return run


def close(mine: torch.Tensor, expected: torch.Tensor) -> None:
    assert mine.shape == expected.shape
    assert ((mine - expected).abs().max() / expected.abs().max()).item() < 1e-5


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shared_images", [False, True])
def test_outputs_and_gradients_are_those_of_a_loop(settings, training, shared_images) -> None:
    torch.manual_seed(0)
    layer = KNConv2d(8, 6, 3, **{"padding": 1} | settings).train(training)
    layer = nn.Sequential(layer, KNConv2d(6, 4, (1, 2), dropout_p=0.2)).train(training)
    parameters, seeds = stacked(layer), torch.tensor([5, -6, 7])
    x = (images()[0] if shared_images else images()).requires_grad_()
    leaves = [x, *parameters.values()]
    run, dims = forward(layer), (0, None if shared_images else 0, 0)
    with path("native"), mock.patch.object(cpp, "of_clients", wraps=cpp.of_clients) as it:
        together = vmap(run, dims)(parameters, x, seeds)
        assert it.call_count == 2 - (not training)  # small units in evaluation go by the definition
        gradients = torch.autograd.grad(together.square().sum(), leaves)
    alone = torch.stack(
        [
            run({n: p[k] for n, p in parameters.items()}, x if shared_images else x[k], int(seed))
            for k, seed in enumerate(seeds)
        ]
    )
    close(together, alone)
    expected = torch.autograd.grad(alone.square().sum(), leaves)
    for mine, wanted in zip(gradients, expected, strict=True):
        close(mine, wanted)


def test_any_dimension_may_be_the_mapped_one() -> None:
    layer = KNConv2d(8, 6, 3)
    run, seed = forward(layer), torch.tensor(2)  # one seed for all: the same masks
    with path("native"):
        first = vmap(run, (0, 0, None))(stacked(layer), images(), seed)
        last = vmap(run, (1, 3, None), 2)(stacked(layer, 1), images().movedim(0, 3), seed)
    torch.testing.assert_close(last.movedim(2, 0), first)


def test_derivatives_of_gradients() -> None:
    torch.manual_seed(0)
    layer = KNConv2d(8, 6, 3, padding=1, activation="relu")
    parameters, seeds, x = stacked(layer), torch.arange(CLIENTS), images().requires_grad_()
    leaves = [x, *parameters.values()]

    def second():
        y = vmap(forward(layer))(parameters, x, seeds)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in first), leaves[:2])

    with path("native"):
        actual = second()
    with path("plain"):
        expected = second()
    for mine, wanted in zip(actual, expected, strict=True):
        close(mine, wanted)


@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap"])
def test_inside_other_transforms_the_definition_serves(transform) -> None:
    layer = KNConv2d(8, 2, 3)
    parameters = {name: p.detach() for name, p in stacked(layer).items()}
    run, seeds = forward(layer), torch.arange(CLIENTS)
    inner = {
        "grad": grad(lambda p, x, s: run(p, x, s).square().sum()),
        "jacrev": jacrev(lambda p, x, s: run(p, x, s).square().sum((1, 2, 3))),
        "vmap": lambda p, x, s: {"y": vmap(lambda image: run(p, image[None], s))(x)},
    }[transform]
    with path("native"), mock.patch.object(cpp, "of_clients") as it:
        together = vmap(inner, randomness="different")(parameters, images(), seeds)
        assert not it.called
    for k in range(CLIENTS):
        own = {name: p[k] for name, p in parameters.items()}
        alone = inner(own, images()[k], seeds[k])
        for name, value in alone.items():
            close(together[name][k], value)


@pytest.mark.parametrize("reason", ["weights shared", "float64", "switched off", "autocast"])
def test_what_the_kernels_do_not_take_goes_by_the_definition(reason) -> None:
    layer, x, seeds = KNConv2d(8, 2, 3), images(), torch.arange(CLIENTS)
    if reason == "float64":
        layer, x = layer.double(), x.double()
    parameters, dims = stacked(layer), (0, 0, 0)
    if reason == "weights shared":
        parameters, dims = dict(layer.named_parameters()), (None, 0, 0)
    off = mock.patch.object(library, "_on", reason != "switched off")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast")
    with path("native"), off, autocast, mock.patch.object(cpp, "of_clients") as it:
        y = vmap(forward(layer), dims)(parameters, x, seeds)
        assert not it.called
    assert y.shape == (CLIENTS, 2, 2, 7, 5)
    y.sum().backward()


def test_outside_a_stream_vmap_says_whether_clients_share_masks() -> None:
    layer = KNConv2d(8, 2, 3, dropout_p=0.5)
    parameters = {n: p.detach().expand(CLIENTS, *p.shape) for n, p in layer.named_parameters()}
    x = images()[:1].expand(CLIENTS, -1, -1, -1, -1)

    def run(parameters, x):
        return functional_call(layer, parameters, x)

    with path("native"):
        different = vmap(run, randomness="different")(parameters, x)
        same = vmap(run, randomness="same")(parameters, x)
    assert not torch.equal(different[0], different[1])
    torch.testing.assert_close(same[0], same[1])


def test_an_empty_batch_passes() -> None:
    layer = KNConv2d(8, 2, 3)
    parameters = stacked(layer)
    with path("native"):
        y = vmap(forward(layer))(parameters, images()[:, :0], torch.arange(CLIENTS))
    assert y.shape == (CLIENTS, 0, 2, 7, 5)
    y.sum().backward()
    assert not parameters["bias"].grad.any()
    assert not parameters["weight"].grad.any()
