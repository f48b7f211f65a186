"""Batch-channel normalization by estimated statistics, with weight standardization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.errors import UserError
from fedkn.layers import BatchChannelNorm2d
from fedkn.normalizers.pooled import moment_role
from fedkn.normalizers.rule import TensorRole
from fedkn.normalizers.ws_group import WeightStandardizedGroupNormalizer

__all__ = ["BatchChannelNormalizer"]


@dataclass(frozen=True)
class BatchChannelNormalizer(WeightStandardizedGroupNormalizer):
    """Micro-batch BCN on weight-standardized convolutions, as its paper trains them together.

    BatchNorm by running estimates, which are constants to the gradient, then normalization of
    groups of channels, per image. So a batch of one is trained on.

    Options: `groups` and `channels_per_group` as for `GroupNormalizer`, and its default rule;
    `estimate_momentum`, by which an estimate moves towards a batch's: the paper's update rate,
    whose value we found in no text; ours is BatchNorm's 0.1.

    Federation rule: parameters shared; the estimates are pooled by the law of total variance (not
    the paper's, which is not federated), because they stand for all images, not for a batch's.
    """

    name: ClassVar[str] = "bcn"
    title: ClassVar[str] = "weight standardization + batch-channel norm"
    paper: ClassVar[str] = "Qiao et al., 2019, arXiv 1903.10520, micro-batch BCN"
    statistics: ClassVar[str] = (
        "running estimates per channel, then the channels of a group and all pixels, per image; "
        "weights per output channel"
    )
    not_for: ClassVar[str] = (
        "Few local steps on clients whose images differ: every client moves the estimates to its "
        "own images while it trains on them; DP-SGD, which cannot add noise to the estimates."
    )
    together: ClassVar[bool] = False
    mixes_examples: ClassVar[bool] = True

    estimate_momentum: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.estimate_momentum) and 0 < self.estimate_momentum <= 1):
            raise UserError(
                f"estimate_momentum = {self.estimate_momentum!r} of normalizer 'bcn' must be above "
                "0 and at most 1"
            )

    def norm(self, channels: int) -> nn.Module:
        """Return BatchChannelNorm2d; UserError where the channels cannot be divided as asked."""
        return BatchChannelNorm2d(
            self.group_count(channels), channels, momentum=self.estimate_momentum
        )

    def role_of(self, module: nn.Module, tensor: str, round: int) -> TensorRole | None:
        """Share the parameters, pool the estimates."""
        del round
        return moment_role(tensor) if isinstance(module, BatchChannelNorm2d) else None
