"""A metric: what its values mean, and which of two is better."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["ACCURACY", "Metric"]


@dataclass(frozen=True)
class Metric:
    """A figure by which models are judged.

    Attributes:
        name: as in metrics.jsonl and in tables, such as ``accuracy`` or ``rmse``.
        higher_is_better: False where the lowest value is the best.
        lowest, highest: the range of possible values; infinite where there is no bound.
        unit: of the value, as tables show it; ``%`` for a share (0 to 1), which is shown a hundred
            times as large.
    """

    name: str
    higher_is_better: bool = True
    lowest: float = -math.inf
    highest: float = math.inf
    unit: str = ""

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1: ``sign * value`` is to be large."""
        return 1 if self.higher_is_better else -1

    @property
    def worst(self) -> float:
        """The worst possible value, infinite where there is no bound."""
        return self.lowest if self.higher_is_better else self.highest

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is better than `other`; NaN is better than nothing."""
        if math.isnan(one) or math.isnan(other):
            return math.isnan(other) and not math.isnan(one)
        return self.sign * one > self.sign * other

    def reaches(self, value: float, target: float) -> bool:
        """Whether `value` is at least as good as `target`."""
        return self.sign * value >= self.sign * target


ACCURACY = Metric("accuracy", True, 0.0, 1.0, "%")
"""The fraction of right answers: what runs before fedkn 0.2 were judged by."""
