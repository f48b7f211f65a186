"""Scaled weight standardization: no normalization of activations at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.layers import Gain, ScaledWSConv2d
from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.factory import activation_layer

__all__ = ["ACTIVATION_GAINS", "ScaledWeightStandardizationNormalizer"]

# 1 / standard deviation of f(z) for z ~ N(0, 1), by quadrature; for ReLU sqrt(2 / (1 - 1 / pi)).
# The tables that go round for other activations were sampled and are good to three digits.
ACTIVATION_GAINS = {
    "relu": math.sqrt(2 / (1 - 1 / math.pi)),
    "relu6": 1.7128585549723951,
    "mish": 1.592025381099446,
    "silu": 1.7871872221004423,
    "gelu": 1.7009262433633332,
}


@dataclass(frozen=True)
class ScaledWeightStandardizationNormalizer(Normalizer):
    """Scaled weight standardization, "normalizer-free".

    Filters are used as ``g * (w - mean) / (sqrt(N) * deviation)``, N weights each, and the
    activation f after a convolution as ``gamma_f * f(z)`` with ``gamma_f = 1 / deviation(f(z))``
    for z ~ N(0, 1): each pair keeps the variance of its input. No layer normalizes activations, so
    where a norm stands alone there is none.

    It changes layers, not networks: the NF-ResNets' scaling of residual branches (alpha, beta,
    SkipInit) is not there, nor is adaptive gradient clipping; the ReLU after a residual addition is
    the network's own and has no gain.

    Federation rule: weights, biases and the gain g of each output channel are shared.
    """

    name: ClassVar[str] = "sws"
    title: ClassVar[str] = "scaled weight standardization"
    paper: ClassVar[str] = "Brock et al., 2021, arXiv 2101.08692; arXiv 2102.06171, Eq. 1"
    statistics: ClassVar[str] = "weights per output channel"
    not_for: ClassVar[str] = (
        "Deep residual networks at high learning rates: the scaled branches and the adaptive "
        "clipping that hold the papers' own networks in range are no part of it, and a "
        "converted network lacks the activations' gains as well."
    )
    affine: ClassVar[bool] = False

    _conv_layer: ClassVar[type[nn.Conv2d]] = ScaledWSConv2d

    def norm(self, channels: int) -> nn.Module:
        """Return the identity."""
        del channels
        return nn.Identity()

    def _norm_act(self, channels: int, activation: str | None) -> dict[str, nn.Module | None]:
        """Return activation and gain (``activation``, ``gain``): no norm."""
        del channels
        return {"activation": activation_layer(activation), "gain": _gain(activation)}


def _gain(activation: str | None) -> nn.Module | None:
    return None if activation is None else Gain(ACTIVATION_GAINS[activation])
