"""Local Context Normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.errors import UserError
from fedkn.layers import LocalContextNorm2d
from fedkn.normalizers.base import Normalizer

__all__ = ["LocalContextNormalizer"]


@dataclass(frozen=True)
class LocalContextNormalizer(Normalizer):
    """LCN: every pixel normalized over the channels of its group and a window around it.

    Options: `window`, the window's side in pixels, the same in every layer; `channels_per_group`,
    0 for the fewest channels, two or more, that divide a layer's (the paper's 2 wherever their
    number is even). The paper's window of 227 pixels would cover the whole of a small image, which
    is GroupNorm; 9 is ours, less than a third of a 32x32 map. An odd window is centred on its
    pixel, where the authors' code has it one pixel off.

    Federation rule: gamma and beta are shared.
    """

    name: ClassVar[str] = "lcn"
    title: ClassVar[str] = "LocalContextNorm"
    paper: ClassVar[str] = "Ortiz et al., CVPR 2020, arXiv 1912.05845"
    statistics: ClassVar[str] = "two channels and a 9x9 window around each pixel"
    not_for: ClassVar[str] = (
        "Small images: its paper segments and detects on large ones, with a window that would "
        "cover a whole map here, and on CIFAR-10 it is among the last four in every column of "
        "docs/early-training.md."
    )
    affine: ClassVar[bool] = True

    window: int = 9
    channels_per_group: int = 0

    def __post_init__(self) -> None:
        for option, value, least in (
            ("window", self.window, 1),
            ("channels_per_group", self.channels_per_group, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(
                    f"{option} = {value!r} of normalizer 'lcn' must be a whole number, "
                    f"{least} or more"
                )

    @property
    def label(self) -> str:
        """Title, window and channels per group."""
        group = f"{self.channels_per_group or 2} channels per group"
        return f"{self.title} (window {self.window}, {group})"

    def norm(self, channels: int) -> nn.Module:
        """Return LocalContextNorm2d; UserError where the channels cannot be divided as asked."""
        asked = self.channels_per_group
        if asked and channels % asked:
            raise UserError(
                f"channels_per_group = {asked} of normalizer 'lcn' does not divide {channels} "
                "channels: choose a divisor, or 0 for the default rule"
            )
        smallest = next((n for n in range(2, channels + 1) if channels % n == 0), 1)
        return LocalContextNorm2d(asked or smallest, channels, self.window)
