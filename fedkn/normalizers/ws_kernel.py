"""Kernel normalization with weight standardization: untested ground, for experiments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedkn.layers import KNConv2d, WSKNConv2d
from fedkn.normalizers.kernel import KernelNormalizer

__all__ = ["WeightStandardizedKernelNormalizer"]


@dataclass(frozen=True)
class WeightStandardizedKernelNormalizer(KernelNormalizer):
    """``kernel`` with standardized filters, as ``ws_group`` is ``group`` with them.

    Options as for `KernelNormalizer`. No paper has it.

    Federation rule: weights and biases are shared.
    """

    name: ClassVar[str] = "ws_kernel"
    title: ClassVar[str] = "weight standardization + KernelNorm"
    paper: ClassVar[str] = "nobody's: arXiv 2205.10089, Eq. 1-5, with arXiv 1903.10520, Eq. 5"
    statistics: ClassVar[str] = (
        "all channels and the pixels under the kernel, per image; weights per output channel"
    )
    not_for: ClassVar[str] = (
        "Anything that should be known to work: it is here to be tried; filters of few weights "
        "(1x1 over few channels, depthwise), of which standardizing takes two degrees of freedom "
        "each."
    )

    _layer: ClassVar[type[KNConv2d]] = WSKNConv2d
