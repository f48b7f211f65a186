"""What so many seeds could show, and how many it takes to show more: in words, and as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fedkn.tasks.metric import ACCURACY, Metric
from simulations.report import formats
from simulations.report.summary import RunSummary
from simulations.report.verdict import Contest, enumerated
from simulations.runs.power import ALPHA, FEWEST_SEEDS, MOST_SEEDS, POWER, spread_known_to
from simulations.runs.statistics import Comparison, smallest_exact_p

__all__ = [
    "Power",
    "own_powers_of",
    "powers",
    "powers_of",
    "what_own_models_show",
    "what_the_seeds_show",
]

POINT = 0.01
"""The difference of shares that is asked for: one point."""


@dataclass(frozen=True)
class Power:
    """What the tests against the best mean could find, by one metric and with the spread seen.

    Attributes:
        seeds: the fewest and the most common seeds of a pair.
        family: pairs that were tested together. level: of one test, 0.05 over these: the strictest
            that Holm's method may ask for.
        detectable: by pair with the best mean the true difference that is found 4 times in 5;
            infinite where no difference that the range of the metric allows is.
        asked: a difference: a point of shares, of other metrics half the median of `detectable`;
            NaN where no difference can be asked for.
        needed: by pair how many seeds find `asked` 4 times in 5; infinite beyond a thousand.
    """

    metric: Metric
    best: str
    seeds: tuple[int, int]
    family: int
    level: float
    detectable: list[float]
    asked: float
    needed: list[float]

    @property
    def seeds_needed(self) -> float:
        """The median of `needed`, rounded up; NaN where nothing was asked for."""
        middle = median(self.needed) if self.needed else math.nan
        return float(math.ceil(middle)) if math.isfinite(middle) else middle

    @property
    def found(self) -> str:
        """The median of `detectable` over the pairs that have one, in words."""
        possible = [value for value in self.detectable if math.isfinite(value)]
        if not possible:
            return "no possible difference"
        return formats.difference_with_unit(median(possible), self.metric)

    @property
    def asked_for(self) -> str:
        """What was asked for and the seeds that it takes, in words: "1 point: 19"."""
        return f"{_asked(self)}: {_count(self.seeds_needed)}" if self.needed else formats.NOTHING

    def short(self) -> str:
        """Return it in one sentence, without the full stop."""
        text = (
            f"with {_seeds(self.seeds)} {self.found} would be found 4 times in 5 "
            f"(paired t-test, Holm over {formats.count(self.family, 'pair')})"
        )
        if not self.needed:
            return text
        return f"{text}; {_asked(self)} takes {_count(self.seeds_needed)} seeds"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it: infinity and NaN become None."""
        return {
            "metric": self.metric.name,
            "test": "paired t-test, Holm",
            "power": POWER,
            "level": self.level,
            "family": self.family,
            "seeds": list(self.seeds),
            "detectable": [_finite(value) for value in self.detectable],
            "asked": _finite(self.asked),
            "needed": [_finite(value) for value in self.needed],
            "seeds_needed": _finite(self.seeds_needed),
        }


def powers(comparisons: Sequence[Comparison], contests: Sequence[Contest]) -> list[Power]:
    """Return what the tests of `contests` against the best mean could find, metric by metric.

    `comparisons` are the whole family, over which they were corrected.
    """
    family = sum(not math.isnan(c.p) for c in comparisons)
    metrics = dict.fromkeys(contest.metric for contest in contests)
    found = (_power(m, family, [c for c in contests if c.metric == m]) for m in metrics)
    return [of for of in found if of is not None]


def powers_of(run: RunSummary) -> list[Power]:
    """Return what the tests of a run's global models could find, metric by metric."""
    return powers(run.comparisons, [c for section in run.sections for c in section.contests])


def own_powers_of(run: RunSummary) -> list[Power]:
    """Return the same of the clients' own models; nothing where none was evaluated."""
    own = [c for section in run.sections for c in section.own_contests]
    return powers(run.own_comparisons, own)


def what_the_seeds_show(comparisons: Sequence[Comparison], contests: Sequence[Contest]) -> str:
    """Return what the tests of a run can and cannot show, in plain words.

    `comparisons` are all pairs of the run; `contests` those whose spread the statement is about.
    """
    tested = [c for c in comparisons if not math.isnan(c.p)]
    if not tested:
        return (
            "No test was possible: it needs two that compete, with results of at least "
            f"{FEWEST_SEEDS} common seeds. One seed says nothing about how much the next one would "
            "differ, and two hardly more."
        )
    fewest, most = min(c.n for c in tested), max(c.n for c in tested)
    floor = smallest_exact_p(most)
    metric = enumerated(list(dict.fromkeys(c.metric.name for c in contests))) or ACCURACY.name
    text = (
        f"Paired t-tests on the final test {metric} of {_seeds((fewest, most))}, corrected by "
        f"Holm's method over {_pairs(len(tested))} of this report: the best mean is picked after "
        "seeing the results, and that has "
        "to be paid for. The t-test takes the differences between seeds as roughly normal, which "
        f"so few seeds cannot verify; the exact sign-flip test, which need not, gives no p-value "
        f"below {floor:.2g} with {most} seeds, before any correction. "
    )
    return text + _told(powers(comparisons, contests))


def what_own_models_show(comparisons: Sequence[Comparison], contests: Sequence[Contest]) -> str:
    """Return what the tests on the clients' own models add; empty where there are none.

    Arguments as of `what_the_seeds_show`.
    """
    tested = sum(not math.isnan(c.p) for c in comparisons)
    if not tested:
        return ""
    metric = enumerated(list(dict.fromkeys(c.metric.name for c in contests))) or ACCURACY.name
    return (
        f"The clients' own models are tested in the same way on their mean {metric} over the "
        "clients: a seed counts once, however many clients it has, for they share a global model. "
        f"These tests are a family of their own, corrected over {_pairs(tested)} of it and not "
        "together "
        "with those on the global model: the chance of a false difference is held to 5% for each "
        f"of the two questions, not for both at once. {_told(powers(comparisons, contests))}"
    ).rstrip()


def _power(metric: Metric, family: int, contests: Sequence[Contest]) -> Power | None:
    pairs = [
        pair
        for contest in contests
        for pair in contest.against_winner()
        if not math.isnan(pair.detectable)
    ]
    if not pairs or not family:
        return None
    possible = [pair.detectable for pair in pairs if math.isfinite(pair.detectable)]
    half = median(possible) / 2 if possible else math.nan
    asked = POINT if metric.unit == "%" else half
    return Power(
        metric=metric,
        best=contests[0].best,
        seeds=(min(pair.n for pair in pairs), max(pair.n for pair in pairs)),
        family=family,
        level=ALPHA / family,
        detectable=[pair.detectable for pair in pairs],
        asked=asked,
        needed=[] if math.isnan(asked) else [pair.seeds_for(asked) for pair in pairs],
    )


def _told(found: Sequence[Power]) -> str:
    return " ".join(_sentences(of) for of in found)


def _sentences(of: Power) -> str:
    none = (
        "no difference that is possible would be found 4 times in 5: “cannot be told apart” says "
        "nothing there"
    )
    possible = [value for value in of.detectable if math.isfinite(value)]
    if not possible:
        return f"With the spread seen here, {none}.{_needed(of)}"
    spread = formats.difference_with_unit(median(possible), of.metric)
    if len(possible) > 1:
        least, most = (formats.difference(end(possible), of.metric) for end in (min, max))
        spread += f" (from {least} to {most}, by pair)"
    rest = len(of.detectable) - len(possible)
    return (
        f"With the spread seen here, a true difference of {spread} from the {of.best} mean "
        "would be missed 1 time in 5, smaller ones more often: “cannot be told apart” does not "
        f"mean equal.{f' For {rest} of {len(of.detectable)} pairs {none}.' if rest else ''}"
        f"{_needed(of)}"
    )


def _needed(of: Power) -> str:
    """How many seeds the difference that is asked for takes, and how far that can be trusted."""
    if not of.needed:
        return ""
    text = f" To find {_asked(of)} as surely takes {_count(of.seeds_needed)} seeds"
    if len(of.needed) > 1:
        text += f" (from {_count(min(of.needed))} to {_count(max(of.needed))}, by pair)"
    low, high = spread_known_to(of.seeds[0])
    return (
        f"{text}, each pair judged at {of.level:.2g}, the strictest level that Holm's method may "
        f"ask for. From {of.seeds[0]} seeds the spread itself is known only to between "
        f"{low:.2g} and {high:.2g} times what was seen, and the seeds needed go with its square: "
        "they are a guide."
    )


def _asked(of: Power) -> str:
    return "1 point" if of.metric.unit == "%" else formats.difference_with_unit(of.asked, of.metric)


def _seeds(ends: tuple[int, int]) -> str:
    fewest, most = ends
    return f"{fewest} seeds" if fewest == most else f"{fewest} to {most} seeds"


def _pairs(count: int) -> str:
    return "1 pair" if count == 1 else f"all {count} pairs"


def _count(seeds: float) -> str:
    return f"more than {MOST_SEEDS:,}" if math.isinf(seeds) else f"{seeds:,.0f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
