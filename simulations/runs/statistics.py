"""What the results of a run show over its seeds, and what so many seeds cannot show.

The primary test is the paired t-test: one seed gives every normalizer the same data split,
partition, cohorts and initial weights as far as shapes allow, so the differences per seed carry
less noise than the accuracies. With 3 to 10 seeds it is the only common test with a chance to
answer: the exact sign-flip (permutation) and Wilcoxon tests cannot give a p-value below
2 / 2**n, which is 0.0625 for 5 seeds before any correction. Its price is the assumption that the
differences are roughly normal, which so few seeds cannot verify.

All pairs of a run are corrected together (Holm 1979), not only those with the winner: the
winner is chosen after the results are seen, and that choice has to be paid for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import optimize, stats

__all__ = [
    "ALPHA",
    "FEWEST_SEEDS",
    "POWER",
    "Comparison",
    "Group",
    "Interval",
    "RoundsToTarget",
    "Scores",
    "compare_all_pairs",
    "detectable_difference",
    "holm",
    "mean_interval",
    "paired_p",
    "rounds_to_target",
    "smallest_exact_p",
    "summarize_rounds",
]

ALPHA = 0.05
POWER = 0.8
# With two, the spread would be judged by a single number.
FEWEST_SEEDS = 3

# Where normalizers compete with one another: a partition's label and a batch size.
Group = tuple[str, int]
# Normalizer -> seed -> accuracy.
Scores = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds with the half-width of its 95% t-interval (NaN below two seeds)."""

    mean: float
    half_width: float
    n: int


@dataclass(frozen=True)
class RoundsToTarget:
    """Rounds to the target accuracy over several cells, those that never reached it included.

    `median` counts a cell that did not reach the target as later than every cell that did, so it
    is infinite where half of them or more did not; no cell is dropped.
    """

    median: float
    reached: int
    total: int


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two normalizers of one group, in accuracy (0 to 1).

    `first` has the higher mean over the `n` common seeds. `half_width` belongs to the 95%
    interval of this difference alone; `p_holm` is corrected over all pairs of the run.
    `detectable` is the true difference that this test would miss one time in five, judged at the
    strictest level that Holm's method may ask for. The p-values
    and `detectable` are NaN below `FEWEST_SEEDS` common seeds.
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

    @property
    def significant(self) -> bool:
        """Whether the difference is told apart from zero at 5% after the correction."""
        return self.p_holm < ALPHA

    def has(self, one: str, other: str) -> bool:
        """Whether this is the comparison of these two normalizers, in either order."""
        return {self.first, self.second} == {one, other}


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean and the half-width of its two-sided 95% Student t-interval."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, math.nan, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * error, n)


def rounds_to_target(accuracies: Mapping[int, float], target: float) -> int | None:
    """Return the first evaluated round with at least the target accuracy, None if there is none."""
    return min((number for number, value in accuracies.items() if value >= target), default=None)


def summarize_rounds(rounds: Sequence[int | None]) -> RoundsToTarget:
    """Aggregate over cells, where None stands for a cell that did not reach the target."""
    values = sorted(math.inf if number is None else float(number) for number in rounds)
    if not values:
        return RoundsToTarget(math.nan, 0, 0)
    low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
    return RoundsToTarget((low + high) / 2, sum(map(math.isfinite, values)), len(values))


def paired_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the paired t-test that the mean difference is zero.

    NaN below `FEWEST_SEEDS` differences; 1 if all are zero. Differences that are all the same and
    not zero have no spread to judge by: the exact sign-flip test's p-value, which is larger,
    stands in.
    """
    n = len(differences)
    if n < FEWEST_SEEDS:
        return math.nan
    mean, deviation = float(np.mean(differences)), _deviation(differences)
    if deviation == 0:
        return 1.0 if abs(mean) < _ROUNDING else smallest_exact_p(n)
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


def detectable_difference(deviation: float, n: int, alpha: float = ALPHA) -> float:
    """Return the true difference that a paired t-test finds with a probability of 80%.

    `deviation` is the standard deviation of the paired differences, `n` their number and `alpha`
    the two-sided level. The power is that of the noncentral t distribution. NaN below two pairs.
    """
    if n < 2 or not deviation > 0:
        return math.nan
    critical = float(stats.t.ppf(1 - alpha / 2, n - 1))

    def shortfall(noncentrality: float) -> float:
        return float(stats.nct.sf(critical, n - 1, noncentrality)) - POWER

    # The power is far above 80% at ten times the critical value, for one degree of freedom too.
    noncentrality = optimize.brentq(shortfall, 0.0, 10 * critical + 10)
    return float(noncentrality) * deviation / math.sqrt(n)


def compare_all_pairs(groups: Mapping[Group, Scores]) -> list[Comparison]:
    """Compare all pairs of normalizers of each group over their common seeds.

    Holm's correction runs over all pairs of all groups that could be tested.
    """
    pairs = [
        (group, first, second, _differences(scores[first], scores[second]))
        for group, scores in groups.items()
        for first, second in combinations(scores, 2)
    ]
    p_values = [paired_p(differences) for *_, differences in pairs]
    tested = sum(not math.isnan(p) for p in p_values)
    return [
        _comparison(group, (first, second), differences, (p, p_holm), tested)
        for (group, first, second, differences), p, p_holm in zip(
            pairs, p_values, holm(p_values), strict=True
        )
    ]


# Accuracies are ratios of whole numbers: equal differences of them still vary in the last bits.
_ROUNDING = 1e-12


def _deviation(differences: Sequence[float]) -> float:
    """The standard deviation, exactly 0 where only rounding is left of it; NaN below two."""
    if len(differences) < 2:
        return math.nan
    deviation = float(np.std(differences, ddof=1))
    return deviation if deviation > _ROUNDING else 0.0


def _differences(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def _comparison(
    group: Group,
    names: tuple[str, str],
    differences: list[float],
    p_values: tuple[float, float],
    tested: int,
) -> Comparison:
    interval = mean_interval(differences)
    first, second = names
    if interval.mean < 0:
        first, second = second, first
    return Comparison(
        group=group,
        first=first,
        second=second,
        n=interval.n,
        difference=abs(interval.mean),
        half_width=interval.half_width,
        p=p_values[0],
        p_holm=p_values[1],
        detectable=detectable_difference(
            _deviation(differences), interval.n, ALPHA / max(tested, 1)
        ),
    )
