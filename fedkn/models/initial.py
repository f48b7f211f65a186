"""Seeded initial weights, the same for every normalizer."""

from __future__ import annotations

import math

from torch import nn

from fedkn import seeds
from fedkn.layers import KNConv1d, KNConv2d, SqueezeExcite2d

__all__ = ["initialize"]


def initialize(model: nn.Module, seed: int) -> None:
    """Draw the weights of `model` in place: a pure function of `seed`.

    Convolutions: Kaiming normal, fan-out (as published for KNResNets); linear layers: uniform
    within 1 / sqrt(inputs); biases zero; norms as they are built. The draw depends on the place of
    a layer among its kind, so the same architecture starts from the same convolutions whatever its
    normalizer: comparisons between normalizers are paired. (What Fixup scales are these draws.)
    """
    convolutions = [m for m in model.modules() if isinstance(m, _Conv)]
    for place, conv in enumerate(convolutions):
        generator = seeds.torch_generator(seed, "initial weights", "convolution", place)
        nn.init.kaiming_normal_(
            conv.weight, mode="fan_out", nonlinearity="relu", generator=generator
        )
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    attention = {m for s in model.modules() if isinstance(s, SqueezeExcite2d) for m in s.modules()}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    # A normalizer's own come last: the head then begins as it does with any other.
    for place, linear in enumerate(sorted(linears, key=attention.__contains__)):
        generator = seeds.torch_generator(seed, "initial weights", "linear", place)
        bound = 1 / math.sqrt(linear.in_features)
        nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | KNConv1d | KNConv2d
