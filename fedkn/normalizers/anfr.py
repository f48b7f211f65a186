"""ANFR: scaled weight standardization and channel attention in the residual branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.layers import Gain, SkipInit, SqueezeExcite2d
from fedkn.normalizers.factory import chain
from fedkn.normalizers.sws import ScaledWeightStandardizationNormalizer

__all__ = ["ANFRNormalizer"]


@dataclass(frozen=True)
class ANFRNormalizer(ScaledWeightStandardizationNormalizer):
    """Adaptive Normalization-Free Feature Recalibration: an NF-ResNet with squeeze-and-excitation.

    The convolutions of ``sws``; every residual branch ends in squeeze-and-excitation, twice its
    output (the sigmoid halves what passes, arXiv 2101.08692), and SkipInit, as in the
    normalizer-free networks that the paper takes its models from.

    Federation rule: everything is shared.
    """

    name: ClassVar[str] = "anfr"
    title: ClassVar[str] = "ANFR"
    paper: ClassVar[str] = "Siomos et al., TMLR 2025, arXiv 2410.02006; arXiv 1709.01507, Eq. 2-4"
    statistics: ClassVar[str] = "weights per output channel; channel attention per image"
    not_for: ClassVar[str] = (
        "Networks without residual branches, in which it is sws, and converted ones, which keep "
        "their own wiring; narrow networks, whose attention has one or two numbers to work with."
    )

    def branch_end(self, channels: int) -> nn.Module | None:
        """Return squeeze-and-excitation, its gain, and SkipInit."""
        return chain(attention=SqueezeExcite2d(channels), gain=Gain(2.0), skip=SkipInit())
