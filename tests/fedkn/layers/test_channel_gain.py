"""A learned factor for every channel, and the kernel normalization that has it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkn import models, normalizers
from fedkn.layers import ChannelGain, KNConv2d


def test_every_channel_has_its_own_factor_which_begins_at_one():
    layer = ChannelGain(3)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 0.0, -1.0]))
    y = layer(x)
    assert torch.equal(y[:, 0], 2 * x[:, 0])
    assert torch.equal(y[:, 1], torch.zeros(2, 4, 5))
    assert torch.equal(y[:, 2], -x[:, 2])


@pytest.mark.parametrize("name", ["kernel", "ws_kernel"])
def test_it_stands_between_the_convolution_and_the_activation(name):
    make = normalizers.create(name, gain=True)
    block = make.conv_norm(3, 4, 3, activation="relu")
    assert [type(m) for m in block.children()][1:] == [ChannelGain, nn.ReLU]
    assert isinstance(block[0], KNConv2d)
    assert block[0].activation is None


def test_it_begins_as_the_network_without_it_and_adds_a_number_a_channel():
    def built(gain: bool) -> nn.Module:
        torch.manual_seed(0)
        return models.build(
            "convnet3",
            num_classes=3,
            in_channels=1,
            width=8,
            normalizer=normalizers.create("kernel", gain=gain),
            final_norm="none",
        ).eval()

    plain, gained = built(False), built(True)
    x = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(gained(x), plain(x))
    gains = [m for m in gained.modules() if isinstance(m, ChannelGain)]
    convolutions = [m for m in plain.modules() if isinstance(m, KNConv2d)]
    assert [m.num_channels for m in gains] == [m.out_channels for m in convolutions]
