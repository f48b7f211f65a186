import math

import pytest
import torch
from scipy import integrate
from torch import nn

from fedkn import normalizers
from fedkn.layers import Gain, ScaledWSConv2d
from fedkn.normalizers.factory import ACTIVATIONS
from fedkn.normalizers.sws import ACTIVATION_GAINS

SWS = normalizers.create("sws")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gains_give_unit_variance_to_normal_input(activation):
    layer = ACTIVATIONS[activation]()

    def moment(power):
        def integrand(z):
            value = layer(torch.tensor(z, dtype=torch.float64)).item()
            return value**power * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

        return integrate.quad(integrand, -10, 10, points=[0, 6], epsabs=1e-9)[0]

    variance = moment(2) - moment(1) ** 2
    assert ACTIVATION_GAINS[activation] == pytest.approx(variance**-0.5, rel=1e-6)


def test_activations_have_their_gain_and_nothing_is_normalized():
    block = SWS.conv_norm(4, 6, 3, activation="mish")
    assert [type(m) for m in block] == [ScaledWSConv2d, nn.Mish, Gain]
    assert block.gain.factor == ACTIVATION_GAINS["mish"]
    assert [type(m) for m in SWS.conv_norm(4, 6, 3)] == [ScaledWSConv2d]
    assert [type(m) for m in SWS.norm_act(4, "relu")] == [nn.ReLU, Gain]
    assert isinstance(SWS.norm(4), nn.Identity)


def test_asymmetric_padding_keeps_the_standardized_convolution():
    conv = SWS.conv(4, 6, 2, padding=(1, 0, 1, 0))
    assert [type(m) for m in conv] == [nn.ZeroPad2d, ScaledWSConv2d]
