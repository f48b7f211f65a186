"""Moving-average batch normalization: statistics of the last batches, on centred weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.errors import UserError
from fedkn.layers import CentredConv2d, MovingAverageNorm2d
from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.rule import TensorRole

__all__ = ["MovingAverageNormalizer"]


@dataclass(frozen=True)
class MovingAverageNormalizer(Normalizer):
    """MABN: a batch is divided by the mean square of the last batches, and its gradient likewise.

    Filters are centred, so that the mean of a batch need not be taken; what stabilizes tiny batches
    is that both statistics, of the forward and of the backward pass, are averages over `window`
    batches, and that the outcome is rescaled towards a running value, within 1/5 and 5.

    Options: `window`, 16 as in the authors' code. `warmup`, the batches before which a batch is
    normalized by itself alone, and `momentum` of the running value: theirs are 100 and 0.02, ours
    20 and BatchNorm's 0.1, because a federated run has few batches (both are two time constants).

    A batch of one is not trained on: while it warms up it is a BatchNorm, for which one image says
    nothing of the others, and the smallest batch in the paper is 2.

    Federation rule: parameters, the running mean square (second moments about zero, whose average
    is that of all images) and the count of batches are shared and averaged. The windows never leave
    a client and begin empty in each round: what they would hold are batches under other weights.
    """

    name: ClassVar[str] = "mabn"
    title: ClassVar[str] = "Moving Average BatchNorm"
    paper: ClassVar[str] = "Yan et al., ICLR 2020, arXiv 2001.06838, Algorithm 1"
    statistics: ClassVar[str] = (
        "the last batches and all pixels, per channel; not centred; weights per output channel"
    )
    not_for: ClassVar[str] = (
        "Local batches of one image, on which it does not train; rounds of fewer local steps than "
        "its window, which begins empty in each; filters of few weights (1x1 over few channels, "
        "depthwise), of which centring takes a degree of freedom each; DP-SGD, which needs "
        "gradients of single examples."
    )
    affine: ClassVar[bool] = True
    minimum_batch: ClassVar[int] = 2
    together: ClassVar[bool] = False
    mixes_examples: ClassVar[bool] = True
    _conv_layer: ClassVar[type[nn.Conv2d]] = CentredConv2d

    window: int = 16
    warmup: int = 20
    momentum: float = 0.1

    def __post_init__(self) -> None:
        for option, least in (("window", 1), ("warmup", 0)):
            value = getattr(self, option)
            if type(value) is not int or value < least:
                raise UserError(
                    f"{option} = {value!r} of normalizer 'mabn' must be a whole number, {least} or "
                    "more"
                )
        if self.window > _LARGEST:
            raise UserError(f"window = {self.window} of normalizer 'mabn' is more than {_LARGEST}")
        if not (math.isfinite(self.momentum) and 0 < self.momentum <= 1):
            raise UserError(
                f"momentum = {self.momentum!r} of normalizer 'mabn' must be above 0 and at most 1"
            )

    @property
    def label(self) -> str:
        """Title and window."""
        return f"{self.title} (of {self.window} batches)"

    def norm(self, channels: int) -> nn.Module:
        """Return MovingAverageNorm2d."""
        return MovingAverageNorm2d(
            channels, window=self.window, warmup=self.warmup, momentum=self.momentum
        )

    def begin_training(self, model: nn.Module, round: int) -> None:
        """Empty the windows."""
        del round
        for module in model.modules():
            if isinstance(module, MovingAverageNorm2d):
                module.forget()

    def role_of(self, module: nn.Module, tensor: str, round: int) -> TensorRole | None:
        """Share weight, bias, the running mean square and the count of batches."""
        del tensor, round
        return TensorRole.SHARED if isinstance(module, MovingAverageNorm2d) else None


_LARGEST = 4096
"""Batches in a window: each is a number per channel, twice."""
