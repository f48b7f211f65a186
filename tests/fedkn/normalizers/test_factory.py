import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkn import normalizers
from fedkn.errors import UserError
from fedkn.layers import KernelNorm2d, KNConv2d, WSConv2d

NAMES = normalizers.names()


def convolutions(module):
    return [m for m in module.modules() if isinstance(m, nn.Conv2d | KNConv2d)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", [1, (1, 0), (1, 0, 2, 1), (1, 1, 0, 0)])
def test_blocks_have_the_shape_of_a_plain_convolution(name, padding):
    make = normalizers.create(name)
    x = torch.randn(2, 6, 9, 9)
    sides = (padding,) * 4 if isinstance(padding, int) else padding
    if len(sides) == 2:
        sides = (padding[1], padding[1], padding[0], padding[0])
    expected = F.conv2d(F.pad(x, sides), torch.zeros(8, 3, 2, 2), stride=2, groups=2).shape
    options = {"stride": 2, "padding": padding, "groups": 2}
    assert make.conv(6, 8, 2, **options)(x).shape == expected
    block = make.conv_norm(6, 8, 2, activation="relu", **options)
    assert block(x).shape == expected
    if name not in ("evonorm_s", "proxy"):  # unlike ReLU, what they make of it goes below zero
        assert block(x).min() >= 0
    assert make.norm_act(6, "relu")(x).shape == x.shape
    assert make.norm(6)(x).shape == x.shape
    assert make.with_settings(dropout_p=0.0).norm(6)(x).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_a_convolution_has_a_bias_exactly_where_no_norm_with_one_follows(name):
    make = normalizers.create(name)
    followed = convolutions(make.conv_norm(4, 4, 3))[0]
    assert (followed.bias is None) == make.affine
    assert convolutions(make.conv(4, 4, 3))[0].bias is not None
    assert (convolutions(make.conv(4, 4, 3, then_norm=True))[0].bias is None) == make.affine
    norms = [m for m in make.norm(4).modules() if getattr(m, "bias", None) is not None]
    assert bool(norms) == make.affine


def test_conv_norm_is_conv_then_norm_then_activation():
    block = normalizers.create("group", groups=2).conv_norm(3, 4, 3, activation="relu")
    x = torch.randn(2, 3, 5, 5)
    by_hand = F.conv2d(x, block.conv.weight)
    by_hand = F.relu(F.group_norm(by_hand, 2, block.norm.weight, block.norm.bias))
    torch.testing.assert_close(block(x), by_hand)


def test_kernel_normalizes_inside_the_convolution_and_fuses_relu():
    make = normalizers.create("kernel", dropout_p=0.2)
    block = make.conv_norm(3, 4, 3, activation="relu")
    assert [type(m) for m in block] == [KNConv2d]
    assert block.conv.dropout_p == 0.2
    plain = make.conv(3, 4, 3)
    plain.load_state_dict(block.conv.state_dict())
    x = torch.randn(2, 3, 5, 5)
    assert torch.allclose(block.eval()(x), plain.eval()(x).relu(), atol=1e-6)
    mish = make.conv_norm(3, 4, 3, activation="mish")
    assert [type(m) for m in mish] == [KNConv2d, nn.Mish]
    assert isinstance(make.norm(4), KernelNorm2d)
    assert make.norm(4).dropout_p == 0.2
    assert make.with_settings(dropout_p=0.5).norm(4).dropout_p == 0.5


def test_ws_group_standardizes_weights():
    make = normalizers.create("ws_group")
    assert isinstance(make.conv(3, 4, 3), WSConv2d)
    assert isinstance(make.norm(4), nn.GroupNorm)


def test_unknown_activation():
    with pytest.raises(UserError, match="did you mean 'relu'"):
        normalizers.create("batch").norm_act(4, "rellu")


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(1, 1), (3, 1), (8, 4), (12, 6), (16, 8), (64, 8), (201, 3), (724, 4), (810, 6), (843, 3)],
)
def test_default_group_count_divides_and_leaves_two_channels(channels, groups):
    assert normalizers.create("group").group_count(channels) == groups


def test_group_counts_as_asked():
    assert normalizers.create("group", groups=4).group_count(12) == 4
    assert normalizers.create("group", channels_per_group=4).group_count(12) == 3
    assert normalizers.create("ws_group", groups=3).norm(12).num_groups == 3


@pytest.mark.parametrize("option", ["groups", "channels_per_group"])
def test_group_counts_that_do_not_divide_name_channels_and_divisors(option):
    make = normalizers.create("group", **{option: 5})
    with pytest.raises(UserError, match=r"does not divide 12 channels.*1, 2, 3, 4, 6, 12"):
        make.norm(12)


@pytest.mark.parametrize(
    "make", [normalizers.create("instance"), normalizers.create("group", channels_per_group=1)]
)
def test_a_single_value_per_group_is_refused_in_training(make):
    layer = make.norm(4)
    layer(torch.randn(2, 4, 2, 1))
    with pytest.raises(UserError, match="erases a 1x1 map"):
        layer(torch.randn(2, 4, 1, 1))


def test_two_channels_per_group_train_on_one_pixel():
    layer = normalizers.create("group", channels_per_group=2).norm(4)
    assert layer(torch.randn(2, 4, 1, 1)).abs().sum() > 0
