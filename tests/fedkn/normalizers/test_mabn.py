from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkn import normalizers
from fedkn.errors import UserError
from fedkn.layers import CentredConv2d, MovingAverageNorm2d
from fedkn.normalizers import TensorRole

MABN = normalizers.create("mabn")


def test_every_tensor_is_shared_and_a_real_number():
    model = nn.Sequential(MABN.norm(3))
    rule = MABN.federation_rule(model)
    assert set(rule) == {"0.weight", "0.bias", "0.running_square", "0.batches"}
    assert set(rule.values()) == {TensorRole.SHARED}
    assert all(t.is_floating_point() and t.dim() == 1 for t in model.state_dict().values())
    assert MABN.role_of(nn.BatchNorm2d(3), "running_var", 1) is None


def test_the_average_of_the_running_squares_is_that_of_all_images():
    torch.manual_seed(0)
    images = [torch.randn(6, 2, 3, 3) + shift for shift in (-1.0, 2.0)]
    layers = [MovingAverageNorm2d(2, momentum=1.0) for _ in images]
    for layer, maps in zip(layers, images, strict=True):
        layer(maps)
    averaged = (layers[0].running_square + layers[1].running_square) / 2
    torch.testing.assert_close(averaged, torch.cat(images).square().mean((0, 2, 3)))


def test_a_round_begins_with_empty_windows():
    block = MABN.conv_norm(2, 4, 3, activation="relu")
    assert isinstance(block.conv, CentredConv2d)
    block(torch.randn(2, 2, 4, 4)).sum().backward()
    assert block.norm.squares.count.item() == 1
    MABN.begin_training(block, 2)
    assert block.norm.squares.count.item() == block.norm.projections.count.item() == 0
    assert not block.norm.squares.values.any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 0}, "window = 0"),
        ({"window": 2.0}, "whole number, 1 or more"),
        ({"window": 10**6}, "more than 4096"),
        ({"warmup": -1}, "warmup = -1"),
        ({"momentum": float("nan")}, "momentum = nan"),
        ({"momentum": 0.0}, "above 0"),
    ],
)
def test_bad_options_are_one_line_that_names_the_fix(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        normalizers.create("mabn", **settings)
    assert "\n" not in str(caught.value)


def test_options_reach_the_layer_and_the_label():
    made = normalizers.create("mabn", window=4, warmup=7, momentum=0.5)
    layer = made.norm(3)
    assert (layer.window, layer.warmup, layer.momentum) == (4, 7, 0.5)
    assert made.label == "Moving Average BatchNorm (of 4 batches)"
