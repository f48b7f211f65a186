"""FRN and EvoNorm-S0 bring their own activation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkn import models, normalizers
from fedkn.layers import EvoNormS0, FilterResponseNorm2d
from fedkn.normalizers.factory import ACTIVATIONS


@pytest.mark.parametrize(
    ("name", "kind"), [("frn", FilterResponseNorm2d), ("evonorm_s", EvoNormS0)]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_other_activation_stands_beside_it(name, kind, activation):
    make = normalizers.create(name)
    assert [type(m) for m in make.conv_norm(4, 4, 3, activation=activation)] == [nn.Conv2d, kind]
    assert [type(m) for m in make.norm_act(4, activation)] == [kind]


def test_frn_has_a_threshold_exactly_where_an_activation_is_asked_for():
    make = normalizers.create("frn")
    assert make.norm_act(4, "mish").norm.tau is not None
    assert make.conv_norm(4, 4, 3, activation="relu").norm.tau is not None
    assert make.conv_norm(4, 4, 3).norm.tau is None
    assert make.norm_act(4, None).norm.tau is None
    assert make.norm(4).tau is None


def test_evonorm_is_affine_alone_exactly_after_a_convolution_without_activation():
    make = normalizers.create("evonorm_s", groups=2)
    assert make.norm_act(4, "mish").norm.v is not None
    assert make.conv_norm(4, 4, 3, activation="relu").norm.v is not None
    assert make.conv_norm(4, 4, 3).norm.v is None
    assert make.norm(4).v is not None
    assert make.with_settings(dropout_p=0.0).norm(4).v is not None
    assert make.norm_act(4, "relu").norm.num_groups == 2


def test_a_mish_network_has_mish_only_where_the_network_itself_puts_it():
    def count(name):
        normalizer = normalizers.create(name)
        model = models.build(
            "knresnet13", num_classes=3, in_channels=2, normalizer=normalizer, width=8
        )
        return sum(isinstance(m, nn.Mish) for m in model.modules())

    assert count("frn") == count("evonorm_s") == 1  # after the final norm, in the head
    assert count("group") > 1


def test_frn_starts_as_relu_after_normalization():
    block = normalizers.create("frn").conv_norm(3, 4, 3, activation="relu")
    x = torch.randn(2, 3, 6, 6)
    maps = F.conv2d(x, block.conv.weight)
    power = maps.square().mean((2, 3), keepdim=True)
    torch.testing.assert_close(block(x), (maps / (power + 1.01e-4).sqrt()).relu())
