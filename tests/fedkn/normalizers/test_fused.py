from __future__ import annotations

from unittest import mock

import pytest
import torch

from fedkn import normalizers
from fedkn.errors import UserError
from fedkn.layers.native import library
from fedkn.models.blocks import Halve, network
from fedkn.normalizers import fused
from fedkn.normalizers.fused import FusedSequential

NAMES = ("group", "ws_group", "layer", "instance")


def _block(name, activation="relu"):
    block = normalizers.create(name).conv_norm(3, 8, 3, padding=1, activation=activation)
    return block.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ["relu", "mish", None])
def test_a_fused_block_gives_what_its_layers_give_one_by_one(name, activation):
    torch.manual_seed(0)
    block = _block(name, activation)
    with torch.no_grad():
        for parameter in block.norm.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    assert isinstance(block, FusedSequential)
    one_by_one = x
    for layer in block:
        one_by_one = layer(one_by_one)
    for y in (block(x), one_by_one):
        y.square().sum().backward()
    if library.load():
        with mock.patch.object(fused, "group_norm", wraps=fused.group_norm) as kernel:
            torch.testing.assert_close(block(x), one_by_one, rtol=1e-5, atol=1e-5)
        kernel.assert_called_once()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_do_not_depend_on_the_kernels(name):
    torch.manual_seed(0)
    block = _block(name)
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    own = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    with library.switched_off():
        plain = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    for one, other in zip(own, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("child", ["norm", "activation"])
def test_a_hook_sees_the_output_of_its_own_layer(child):
    block = _block("group")
    seen = []
    getattr(block, child).register_forward_hook(lambda *call: seen.append(call[2]))
    y = block(torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last))
    (output,) = seen
    assert (output.min() < 0).item() is (child == "norm")
    torch.testing.assert_close(output.relu(), y)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [8, 9, 3])
def test_a_pooled_block_gives_what_the_pooling_of_its_output_gives(name, side):
    torch.manual_seed(0)
    block, pool = _block(name), Halve()
    x = torch.randn(2, 3, side, side).contiguous(memory_format=torch.channels_last)
    found = []
    for y in (block.pooled(x, pool), pool(block(x))):
        found.append((y, *torch.autograd.grad(y.square().sum(), list(block.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if library.load():
        with mock.patch.object(fused, "group_norm", wraps=fused.group_norm) as kernel:
            block.pooled(x, pool)
        assert kernel.call_args.args[-1] == (side == 8)


@pytest.mark.parametrize("child", ["unit", "pool", "unit.norm", "unit.activation"])
def test_a_hook_in_a_network_sees_the_output_of_its_own_layer(child):
    torch.manual_seed(0)
    whole = network([("unit", _block("group")), ("pool", Halve())])
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    expected = whole(x)
    seen = []
    whole.get_submodule(child).register_forward_hook(lambda *call: seen.append(call[2]))
    torch.testing.assert_close(whole(x), expected, rtol=1e-5, atol=1e-5)
    assert [tuple(output.shape[2:]) for output in seen] == [(3, 3) if child == "pool" else (6, 6)]


def test_maps_that_a_norm_would_erase_are_refused_in_a_block_too():
    block = normalizers.create("instance").norm_act(8, "relu")
    x = torch.randn(2, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    with pytest.raises(UserError, match="erases a 1x1 map"):
        block(x)


def test_a_block_can_be_traced():
    block = _block("group")
    traced = torch.fx.symbolic_trace(block)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(traced(x), block(x), rtol=1e-5, atol=1e-5)
