"""No normalization at all: the baseline that says what a normalizer is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.factory import activation_layer

__all__ = ["NoNormalizer"]


@dataclass(frozen=True)
class NoNormalizer(Normalizer):
    """Plain convolutions with biases."""

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "no normalization"
    paper: ClassVar[str] = "plain convolutions with Kaiming initialization, arXiv 1502.01852"
    statistics: ClassVar[str] = ""
    not_for: ClassVar[str] = (
        "Hardly anything: nothing keeps the maps in range, and it is in the lower half of every "
        "column of docs/early-training.md; it says what a normalizer is worth."
    )
    affine: ClassVar[bool] = False

    def norm(self, channels: int) -> nn.Module:
        """Return the identity."""
        del channels
        return nn.Identity()

    def _norm_act(self, channels: int, activation: str | None) -> dict[str, nn.Module | None]:
        """Return the activation alone."""
        del channels
        return {"activation": activation_layer(activation)}
