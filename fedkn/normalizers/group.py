"""Group normalization, and the group counts that fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.errors import UserError
from fedkn.normalizers.fused import FusedNormalizer, refuse_single_value

__all__ = ["GroupNormalizer"]

_MOST_GROUPS = 8


@dataclass(frozen=True)
class GroupNormalizer(FusedNormalizer):
    """GroupNorm: statistics per example over the channels of a group and all pixels.

    Options: `groups` or `channels_per_group`, at most one of them. With neither (0), a layer has
    the largest group count up to 8 that divides its channels and leaves at least two in a group.
    Eight, because the paper's tables are flat from 8 to 64 groups and from 4 to 64 channels per
    group, and 8 stays inside both for widths from 32 to 512; two channels at least, because a
    group of one channel on a 1x1 map normalizes a single number and so erases its input.
    """

    name: ClassVar[str] = "group"
    title: ClassVar[str] = "GroupNorm"
    paper: ClassVar[str] = "Wu & He, ECCV 2018, arXiv 1803.08494, Eq. 7, Table 3"
    statistics: ClassVar[str] = "the channels of a group and all pixels, per image"
    not_for: ClassVar[str] = (
        "Groups of very few channels, which come close to InstanceNorm; networks whose weights "
        "may be standardized as well: ws_group, which does that, has the higher mean in every "
        "column of docs/early-training.md."
    )
    affine: ClassVar[bool] = True

    groups: int = 0
    channels_per_group: int = 0

    def __post_init__(self) -> None:
        for option, value in (
            ("groups", self.groups),
            ("channels_per_group", self.channels_per_group),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserError(
                    f"{option} = {value!r} of normalizer '{self.name}' must be a whole number, "
                    "1 or more (0: the default rule)"
                )
        if self.groups and self.channels_per_group:
            raise UserError(
                f"normalizer '{self.name}' takes groups or channels_per_group, not both"
            )

    @property
    def label(self) -> str:
        """Title and group count."""
        if self.channels_per_group:
            return f"{self.title} ({self.channels_per_group} channels per group)"
        return f"{self.title} ({self.groups or f'at most {_MOST_GROUPS}'} groups)"

    def norm(self, channels: int) -> nn.Module:
        """Return GroupNorm for `channels`; UserError where they cannot be divided as asked."""
        layer = nn.GroupNorm(self.group_count(channels), channels)
        layer.register_forward_pre_hook(refuse_single_value)
        return layer

    def group_count(self, channels: int) -> int:
        """Return the number of groups of a layer with `channels` channels."""
        asked = self.groups or self.channels_per_group
        if not asked:
            limit = max(1, min(_MOST_GROUPS, channels // 2))
            return max(n for n in _divisors(channels) if n <= limit)
        if channels % asked:
            option = "groups" if self.groups else "channels_per_group"
            fitting = ", ".join(str(n) for n in _divisors(channels))
            raise UserError(
                f"{option} = {asked} of normalizer '{self.name}' does not divide {channels} "
                f"channels: choose one of {fitting}, or 0 for the default rule"
            )
        return self.groups or channels // self.channels_per_group


def _divisors(channels: int) -> list[int]:
    return [n for n in range(1, channels + 1) if channels % n == 0]
