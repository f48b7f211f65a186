"""Fixup: no normalization, but residual branches that begin as nothing and learn at a set pace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fedkn.layers import Multiplier, Shift, ShiftedConv2d
from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.factory import ACTIVATIONS

__all__ = ["FixupNormalizer"]


@dataclass(frozen=True)
class FixupNormalizer(Normalizer):
    """Fixup initialization (Zhang, Dauphin & Ma, Sec. 3), its three rules.

    1. The classifier and the last convolution of every residual branch begin at zero.
    2. Every other convolution of a branch begins ``L ** (-1 / (2m - 2))`` times as large, L the
       number of branches and m the number of the branch's layers. What is scaled are the draws
       that all normalizers begin from.
    3. Every convolution and the classifier have one learned number added to their input, every
       activation after a convolution one to its own; every branch ends in a learned multiplier,
       from one, and another number.

    Where a branch ends in an activation (ResNet-8), a last convolution at zero would never learn,
    since ReLU's gradient at zero is zero: there the multiplier is the last of m layers and begins
    at zero. The authors train these numbers at a tenth of the rate, and a shortcut's convolution
    shares its branch's first: here all have one rate, and each convolution its own.

    Federation rule: everything is shared.
    """

    name: ClassVar[str] = "fixup"
    title: ClassVar[str] = "Fixup"
    paper: ClassVar[str] = "Zhang, Dauphin & Ma, ICLR 2019, arXiv 1901.09321, Sec. 3"
    not_for: ClassVar[str] = (
        "Networks without residual branches, of which only the classifier begins otherwise, and "
        "converted ones, which keep their weights; short runs, whose branches and classifier have "
        "to grow from zero first."
    )
    affine: ClassVar[bool] = True

    _conv_layer: ClassVar[type[nn.Conv2d]] = ShiftedConv2d

    def norm(self, channels: int) -> nn.Module:
        """Return Shift."""
        del channels
        return Shift()

    def before_head(self) -> nn.Module | None:
        """Return Shift."""
        return Shift()

    def branch_end(self, channels: int) -> nn.Module | None:
        """Return Multiplier."""
        del channels
        return Multiplier()

    def begin(self, branches: Sequence[nn.Module], head: nn.Linear) -> None:
        """Scale the branches' drawn weights, and begin what begins at zero."""
        with torch.no_grad():
            for branch in branches:
                _begin(branch, len(branches))
            head.weight.zero_()
            head.bias.zero_()

    def _norm_act(self, channels: int, activation: str | None) -> dict[str, nn.Module | None]:
        """Return Shift and the activation, or nothing where there is none."""
        made = super()._norm_act(channels, activation)
        return {} if activation is None else made


def _begin(branch: nn.Module, branches: int) -> None:
    layers = list(branch.modules())
    places = [place for place, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    after = layers[places[-1] :]
    if any(isinstance(layer, _ACTIVATIONS) for layer in after):
        last = next(layer.gain for layer in after if isinstance(layer, Multiplier))
        scaled = places
    else:
        last = layers[places[-1]].get_parameter("weight")
        scaled = places[:-1]
    for place in scaled:
        layers[place].get_parameter("weight").mul_(branches ** (-1 / (2 * len(scaled))))
    last.zero_()


_ACTIVATIONS = tuple(ACTIVATIONS.values())
