"""Batch renormalization under federated averaging."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.errors import UserError
from fedkn.layers import BatchRenorm2d
from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.rule import TensorRole

__all__ = ["BatchRenormalizer"]


@dataclass(frozen=True)
class BatchRenormalizer(Normalizer):
    """Batch renormalization: BatchNorm, corrected towards the running statistics.

    ``y = gamma * ((x - mu_B) / s_B * r + d) + beta`` with ``r = clip(s_B / s)`` and
    ``d = clip((mu_B - mu) / s)`` held constant for the gradient; evaluation uses mu and s.

    Options: `r_max` and `d_max`, the clips at full width; `ramp`, the number of batches after which
    they are: BatchNorm for the first eighth of it, then linear, d_max reached at five eighths.
    These are the paper's proportions; its ramp is 40,000 batches, ours 400, because a federated run
    has few. `momentum` of the running statistics: the paper's is 0.01, ours 0.1, BatchNorm's.

    A batch of one is not trained on: during the first batches the method is BatchNorm, for which
    one image says nothing of the others, and the smallest batch in the paper is 4.

    Federation rule: everything is shared and averaged, the running mean and deviation and the
    count of batches (a real number, from which the clips follow) as well. So the schedule goes on
    from round to round, by the average number of batches that clients saw.
    """

    name: ClassVar[str] = "brn"
    title: ClassVar[str] = "BatchRenorm"
    paper: ClassVar[str] = "Ioffe, NeurIPS 2017, arXiv 1702.03275, Algorithm 1"
    statistics: ClassVar[str] = (
        "the batch and all pixels, per channel, corrected by the running ones"
    )
    not_for: ClassVar[str] = (
        "Local batches of one image, on which it does not train; runs of fewer local steps than "
        "an eighth of `ramp`, in which it is BatchNorm; DP-SGD, which needs gradients of single "
        "examples."
    )
    affine: ClassVar[bool] = True
    minimum_batch: ClassVar[int] = 2
    together: ClassVar[bool] = False
    mixes_examples: ClassVar[bool] = True

    r_max: float = 3.0
    d_max: float = 5.0
    ramp: int = 400
    momentum: float = 0.1

    def __post_init__(self) -> None:
        for option, value, valid, bounds in (
            ("r_max", self.r_max, self.r_max >= 1, "1 or more"),
            ("d_max", self.d_max, self.d_max >= 0, "0 or more"),
            ("ramp", self.ramp, self.ramp >= 1, "1 or more"),
            ("momentum", self.momentum, 0 < self.momentum <= 1, "above 0 and at most 1"),
        ):
            if not (math.isfinite(value) and valid):
                raise UserError(f"{option} = {value!r} of normalizer 'brn' must be {bounds}")

    @property
    def label(self) -> str:
        """Title and clips."""
        return (
            f"{self.title} (r up to {self.r_max:g}, d up to {self.d_max:g} "
            f"after {self.ramp} batches)"
        )

    def norm(self, channels: int) -> nn.Module:
        """Return BatchRenorm2d."""
        return BatchRenorm2d(
            channels,
            r_max=self.r_max,
            d_max=self.d_max,
            ramp=self.ramp,
            momentum=self.momentum,
        )

    def role_of(self, module: nn.Module, tensor: str, round: int) -> TensorRole | None:
        """Share weight, bias, running statistics and the count of batches."""
        del tensor, round
        return TensorRole.SHARED if isinstance(module, BatchRenorm2d) else None
