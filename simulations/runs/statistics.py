"""What the results of a run show over its seeds, and what so many seeds cannot show.

The primary test is the paired t-test: one seed gives every normalizer the same data split,
partition, cohorts and initial weights as far as shapes allow, so the differences per seed carry
less noise than the accuracies. With 3 to 10 seeds it is the only common test with a chance to
answer: the exact sign-flip (permutation) and Wilcoxon tests cannot give a p-value below
2 / 2**n, which is 0.0625 for 5 seeds before any correction. Its price is the assumption that the
differences are roughly normal, which so few seeds cannot verify.

All pairs of a report are corrected together (Holm 1979), not only those with the winner: the
winner is chosen after the results are seen, and that choice has to be paid for. The family is every
pair of normalizers within equal values of all else, and every pair of values of a further axis
within equal normalizer, batch size and partition.

Which of two values is better, the metric says (`fedkn.tasks.metric`): a metric and its mirror image
have the same p-values, the same intervals mirrored and the same winner.

Intervals end where the metric's range does. A true mean lies in the range, so the interval cut off
there covers it exactly as often as the whole one does (on intervals for bounded parameters:
Mandelkern 2002, Statistical Science 17(2)).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np
from scipy import stats

from fedkn.tasks.metric import ACCURACY, Metric
from simulations.runs.power import ALPHA, FEWEST_SEEDS, detectable_difference, seeds_needed

__all__ = [
    "ALPHA",
    "FEWEST_SEEDS",
    "Comparison",
    "Group",
    "Interval",
    "RoundsToTarget",
    "Scores",
    "compare_all_pairs",
    "holm",
    "mean_interval",
    "paired_p",
    "rounds_to_target",
    "smallest_exact_p",
    "summarize_rounds",
]

# Where names compete with one another: all that is equal for them.
Group = Hashable
GroupT = TypeVar("GroupT", bound=Hashable)
# Name (of a normalizer, of a value of an axis) -> seed -> value of the metric.
Scores = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds with the half-width of its 95% t-interval (NaN below two seeds).

    `low` and `high` are its ends, within the range of possible values (NaN below two seeds).
    """

    mean: float
    half_width: float
    n: int
    low: float = math.nan
    high: float = math.nan

    @property
    def cut(self) -> bool:
        """Whether the range of possible values cuts off a part, so that "±" would not be true."""
        whole = self.mean - self.half_width, self.mean + self.half_width
        return self.n > 1 and (self.low, self.high) != whole


@dataclass(frozen=True)
class RoundsToTarget:
    """Rounds to the target over several cells, those that never reached it included.

    `median` counts a cell that did not reach the target as later than every cell that did, so it
    is infinite where half of them or more did not; no cell is dropped.
    """

    median: float
    reached: int
    total: int


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two names of one group, in values of the metric.

    `first` has the better mean over the `n` common seeds, `difference` says by how much: it is
    never negative, whichever direction is better. `half_width` belongs to the 95% interval of this
    difference alone, of which `low` and `high` are the ends within what the metric's range allows;
    `p_holm` is corrected over the whole family. `detectable` is the true difference that this test
    would miss one time in five, judged at the strictest level that Holm's method may ask for; it
    is infinite where no difference that the range allows would be found so often. The p-values
    and `detectable` are NaN below `FEWEST_SEEDS` common seeds. `deviation` is the standard
    deviation of the paired differences, NaN below two seeds, and `level` that strictest level.
    """

    group: Group
    first: str
    second: str
    n: int
    difference: float
    half_width: float
    p: float
    p_holm: float
    detectable: float
    low: float = math.nan
    high: float = math.nan
    deviation: float = math.nan
    level: float = ALPHA

    @property
    def cut(self) -> bool:
        """Whether the range of possible differences cuts off a part of the interval."""
        whole = self.difference - self.half_width, self.difference + self.half_width
        return self.n > 1 and (self.low, self.high) != whole

    @property
    def significant(self) -> bool:
        """Whether the difference is told apart from zero at 5% after the correction."""
        return self.p_holm < ALPHA

    def seeds_for(self, difference: float) -> float:
        """Return how many seeds find a true `difference` 4 times in 5, as `seeds_needed` does."""
        return seeds_needed(difference, self.deviation, self.level)

    def has(self, one: str, other: str) -> bool:
        """Whether this is the comparison of these two names, in either order."""
        return {self.first, self.second} == {one, other}


def mean_interval(
    values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf
) -> Interval:
    """Return the mean and its two-sided 95% Student t-interval, within `lowest` to `highest`."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, math.nan, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * error
    return Interval(mean, half, n, max(mean - half, lowest), min(mean + half, highest))


def rounds_to_target(
    values: Mapping[int, float], target: float, metric: Metric = ACCURACY
) -> int | None:
    """Return the first evaluated round at least as good as the target, None if there is none."""
    return min(
        (number for number, value in values.items() if metric.reaches(value, target)), default=None
    )


def summarize_rounds(rounds: Sequence[int | None]) -> RoundsToTarget:
    """Aggregate over cells, where None stands for a cell that did not reach the target."""
    values = sorted(math.inf if number is None else float(number) for number in rounds)
    if not values:
        return RoundsToTarget(math.nan, 0, 0)
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    return RoundsToTarget((low + high) / 2, sum(map(math.isfinite, values)), len(values))


def paired_p(differences: Sequence[float], scale: float = 1.0) -> float:
    """Return the two-sided p-value of the paired t-test that the mean difference is zero.

    `scale` is the size of the values that were subtracted: what is less than 1e-12 of it is their
    rounding.

    NaN below `FEWEST_SEEDS` differences; 1 if all are zero. Differences that are all the same and
    not zero have no spread to judge by: the exact sign-flip test's p-value, which is larger,
    stands in.
    """
    n = len(differences)
    if n < FEWEST_SEEDS:
        return math.nan
    mean, deviation = float(np.mean(differences)), _deviation(differences, scale)
    if deviation == 0:
        return 1.0 if abs(mean) <= _ROUNDING * scale else smallest_exact_p(n)
    return float(2 * stats.t.sf(abs(mean) / deviation * math.sqrt(n), n - 1))


def smallest_exact_p(n: int) -> float:
    """Return the smallest two-sided p-value that an exact sign-flip test of `n` pairs can give."""
    return min(1.0, 2.0 ** (1 - n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected by Holm's step-down method; NaN (no test) stays out of it."""
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[index] = largest
    return corrected


def compare_all_pairs(
    groups: Mapping[GroupT, Scores], metrics: Mapping[GroupT, Metric] | None = None
) -> list[Comparison]:
    """Compare all pairs of names of each group over their common seeds.

    Holm's correction runs over all pairs of all groups that could be tested. `metrics` says of a
    group what its scores are; without it they are accuracies.
    """
    pairs = [
        (group, first, second, *_differences(scores[first], scores[second]))
        for group, scores in groups.items()
        for first, second in combinations(scores, 2)
    ]
    p_values = [paired_p(differences, scale) for *_, differences, scale in pairs]
    tested = sum(not math.isnan(p) for p in p_values)
    known = metrics or {}
    return [
        _comparison(
            group,
            (first, second),
            (differences, scale),
            (p, p_holm),
            (known.get(group, ACCURACY), ALPHA / max(tested, 1)),
        )
        for (group, first, second, differences, scale), p, p_holm in zip(
            pairs, p_values, holm(p_values), strict=True
        )
    ]


# Equal differences of ratios of whole numbers, as accuracies are, still vary in the last bits.
_ROUNDING = 1e-12


def _deviation(differences: Sequence[float], scale: float) -> float:
    """The standard deviation, exactly 0 where only rounding is left of it; NaN below two."""
    if len(differences) < 2:
        return math.nan
    deviation = float(np.std(differences, ddof=1))
    return deviation if deviation > _ROUNDING * scale else 0.0


def _differences(
    first: Mapping[int, float], second: Mapping[int, float]
) -> tuple[list[float], float]:
    """The differences by common seed, and the size of the largest value among them."""
    seeds = sorted(first.keys() & second.keys())
    scale = max((abs(of[seed]) for seed in seeds for of in (first, second)), default=1.0)
    return [first[seed] - second[seed] for seed in seeds], scale


def _comparison(
    group: Group,
    names: tuple[str, str],
    paired: tuple[list[float], float],
    p_values: tuple[float, float],
    judged: tuple[Metric, float],
) -> Comparison:
    """The comparison of paired differences of a scale, with p-values before and after correction.

    It is by a metric, and judged at a level.
    """
    first, second = names
    differences, scale = paired
    metric, level = judged
    if len(differences) and metric.sign * float(np.mean(differences)) < 0:
        first, second = second, first
        differences = [-value for value in differences]
    # From here on a difference is an advantage: how much better the first one is.
    advantages = [metric.sign * value for value in differences]
    width = metric.highest - metric.lowest
    interval = mean_interval(advantages, -width, width)
    deviation = _deviation(advantages, scale)
    tested = interval.n >= FEWEST_SEEDS
    detectable = detectable_difference(deviation, interval.n, level) if tested else math.nan
    return Comparison(
        group=group,
        first=first,
        second=second,
        n=interval.n,
        difference=abs(interval.mean),
        half_width=interval.half_width,
        p=p_values[0],
        p_holm=p_values[1],
        detectable=math.inf if detectable > width else detectable,
        low=interval.low,
        high=interval.high,
        deviation=deviation,
        level=level,
    )
