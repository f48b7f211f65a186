"""What a builder is told, and what an architecture declares about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fedkn.normalizers import Normalizer

__all__ = ["Architecture", "FinalNorm", "ModelSpec"]

FinalNorm = Literal["none", "kernel", "own"]


@dataclass(frozen=True)
class ModelSpec:
    """One model to build: everything a builder needs, every choice already made."""

    num_classes: int
    in_channels: int
    normalizer: Normalizer
    width: int
    published_width: int
    final_norm: FinalNorm
    final_normalizer: Normalizer | None
    """Whose norm stands before the last pooling; None where there is none."""
    low_resolution: bool

    def scaled(self, channels: int) -> int:
        """Return a published number of channels, scaled to the width asked for."""
        return max(1, round(channels * self.width / self.published_width))

    @property
    def ends_in_own_norm(self) -> bool:
        """Whether the normalizer's own norm follows the last convolution."""
        return self.final_norm == "own"

    def final_layer(self, channels: int) -> nn.Module | None:
        """Return the norm before the last pooling, None where there is none."""
        return None if self.final_normalizer is None else self.final_normalizer.norm(channels)


@dataclass(frozen=True)
class Architecture:
    """A network as published; the normalizer is chosen when it is built."""

    builder: Callable[[ModelSpec], nn.Module]
    paper: str
    width: int
    """Channels of the first layer; all others scale with it."""
    final_norm: FinalNorm
    """Norm before the last pooling: "own" for pre-activation networks, whose blocks end bare."""
    dropout_p: float
    """The `dropout_p` of a normalizer that has this option: KernelNorm's statistics."""
    final_dropout_p: float
    """The same, of the norm before the last pooling."""
    resolutions: tuple[Literal["low", "high"], ...] = ("low", "high")
