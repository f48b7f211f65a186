"""Scaled weight standardization in residual networks that begin as their shortcuts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.layers import SkipInit
from fedkn.normalizers.sws import ScaledWeightStandardizationNormalizer

__all__ = ["NormalizerFreeNormalizer"]


@dataclass(frozen=True)
class NormalizerFreeNormalizer(ScaledWeightStandardizationNormalizer):
    """``sws`` with SkipInit: every residual branch ends in one learned number, from zero.

    Of the NF-ResNets' wiring it has the part that a branch can have by itself. Their fixed scales
    (alpha before the addition, 1/beta before the branch) follow from a block's place in the whole
    network; with the branches at zero both begin as factors of nothing.

    Federation rule: weights, biases, gains and the branches' numbers are shared.
    """

    name: ClassVar[str] = "nf"
    title: ClassVar[str] = "scaled weight standardization + SkipInit"
    paper: ClassVar[str] = "De & Smith, NeurIPS 2020, arXiv 2002.10444; arXiv 2101.08692"
    not_for: ClassVar[str] = (
        "Networks without residual branches, in which it is sws, and converted ones, which keep "
        "their own wiring; short runs of shallow networks, whose branches have to grow first."
    )

    def branch_end(self, channels: int) -> nn.Module | None:
        """Return SkipInit."""
        del channels
        return SkipInit()
