"""GroupNorm and max-pooling under vmap over clients: what a loop over the clients does."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from fedkn.layers import group_norm as norms
from fedkn.layers import max_pool as pools
from fedkn.layers.group_norm import group_norm, serves
from fedkn.layers.max_pool import max_pool
from fedkn.layers.native import library
from tests.fedkn.layers.paths import path

CLIENTS = 3


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    if not library.load():
        pytest.skip("the fused CPU kernels cannot be built here")


def _drawn():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(CLIENTS, 2, 12, 7, 6, generator=draw)
    gain, shift = (torch.randn(CLIENTS, 12, generator=draw) for _ in range(2))
    return [t.requires_grad_() for t in (x, gain, shift)]


def _layer(x, gain, shift):
    assert serves(x, gain, shift)
    return max_pool(group_norm(x, 4, gain, shift, 1e-5, True))


def _pytorch(x, gain, shift):
    return F.max_pool2d(F.group_norm(x, 4, gain, shift, 1e-5).relu(), 2)


def test_outputs_and_gradients_are_those_of_a_loop():
    leaves = _drawn()
    with path("native"), mock.patch.object(norms, "_of_clients", wraps=norms._of_clients) as norm:
        with mock.patch.object(pools, "_of_clients", wraps=pools._of_clients) as pool:
            together = vmap(_layer)(*leaves)
        norm.assert_called_once()
        pool.assert_called_once()
    alone = torch.stack([_pytorch(*(t[k] for t in leaves)) for k in range(CLIENTS)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    g = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1))
    found = [torch.autograd.grad(y, leaves, g, retain_graph=True) for y in (together, alone)]
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_any_dimension_may_be_the_mapped_one():
    x, gain, shift = (t.detach() for t in _drawn())
    expected = vmap(_layer)(x, gain, shift)
    moved = vmap(_layer, (2, 1, 0), 3)(x.movedim(0, 2), gain.movedim(0, 1), shift)
    assert torch.equal(moved.movedim(3, 0), expected)


def test_clients_may_share_images_or_shifts():
    x, gain, shift = (t.detach() for t in _drawn())
    shared = vmap(_layer, (None, 0, None))(x[0], gain, shift[0])
    repeated = vmap(_layer)(
        x[:1].expand(CLIENTS, *x.shape[1:]), gain, shift[:1].expand(CLIENTS, *shift.shape[1:])
    )
    assert torch.equal(shared, repeated)


def test_derivatives_of_gradients():
    leaves = [t.detach().double().requires_grad_() for t in _drawn()]
    single = [t.detach().float().requires_grad_() for t in leaves]
    found = []
    for function, given in ((_layer, single), (_pytorch, leaves)):
        y = vmap(function)(*given)
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(sum(f.square().sum() for f in first), given[:2]))
    for mine, expected in zip(*found, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(mine.double() / scale, expected / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("reason", ["gains shared", "inside grad", "switched off", "float64"])
def test_what_the_kernels_do_not_take_is_left_to_pytorch(reason):
    x, gain, shift = (t.detach() for t in _drawn())
    seen = []

    def layer(x, gain, shift):
        seen.append(serves(x, gain, shift))
        return F.group_norm(x, 4, gain, shift).sum()

    if reason == "gains shared":
        vmap(layer, (0, None, None))(x, gain[0], shift[0])
    elif reason == "inside grad":
        vmap(torch.func.grad(layer))(x, gain, shift)
    elif reason == "switched off":
        with library.switched_off():
            vmap(layer)(x, gain, shift)
    else:
        vmap(layer)(x.double(), gain.double(), shift.double())
    assert seen == [False]


def test_clients_of_one_channel_may_share_a_shift():
    x, gain = torch.randn(CLIENTS, 2, 1, 4, 4), torch.randn(CLIENTS, 1)

    def layer(x, gain, shift):
        assert serves(x, gain, shift)
        return group_norm(x, 1, gain, shift, 1e-5, False)

    together = vmap(layer, (0, 0, None))(x, gain, torch.tensor([0.5]))
    alone = torch.stack(
        [F.group_norm(x[k], 1, gain[k], torch.tensor([0.5])) for k in range(CLIENTS)]
    )
    torch.testing.assert_close(together, alone)
