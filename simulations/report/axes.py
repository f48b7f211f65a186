"""What the further axes of a comparison show: the values of each, all else being equal.

A run set beside others is one more axis, whose values are the runs' names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from simulations.report import formats
from simulations.report.entries import Entry
from simulations.report.verdict import Contest
from simulations.runs.axes import RUN, Point, point_label
from simulations.runs.statistics import FEWEST_SEEDS, Comparison, Interval

__all__ = [
    "NORMALIZER",
    "AxisContest",
    "Held",
    "Spot",
    "axis_contests",
    "axis_verdicts",
    "fields_of",
    "held_of",
]


NORMALIZER = "normalizer"
"""What is varied where normalizers are compared."""


class Spot(NamedTuple):
    """Where an entry stands in a report."""

    run: str
    partition: str
    point: Point
    normalizer: str
    batch_size: int


class Held(NamedTuple):
    """What is equal for all that are compared: the group of a comparison.

    `axis` is what is varied: `NORMALIZER`, the key of a further axis, or the runs. `point` is
    without it; `run` is empty where runs are compared, and `normalizer` where normalizers are.
    `basis` is what values must share to be compared at all: the metric and the test examples.
    """

    axis: str
    run: str
    partition: str
    point: Point
    normalizer: str
    batch_size: int
    basis: object = None

    @property
    def label(self) -> str:
        """All that is equal within a run, in words."""
        parts = (
            f"{self.normalizer} at batch size {self.batch_size}".lstrip(),
            self.partition,
            point_label(self.point),
        )
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class AxisContest:
    """The values of one axis, all else being equal.

    Attributes:
        held: what is equal. contest: the values, under their texts. intervals: of their means.
    """

    held: Held
    contest: Contest
    intervals: Mapping[str, Interval]

    @property
    def axis(self) -> str:
        """The key of the axis."""
        return self.held.axis


def held_of(comparison: Comparison) -> Held:
    """Return what is equal for the two that a comparison of a report compares."""
    if not isinstance(comparison.group, Held):
        raise TypeError("not a comparison of a report")
    return comparison.group


def fields_of(
    entries: Mapping[Spot, Entry],
    axes: Iterable[str],
    final: Callable[[Entry], Mapping[int, float]],
    basis: Callable[[Spot], object],
) -> dict[Held, dict[str, Spot]]:
    """Return what competes along each of `axes`: by what is equal, the entry of each value.

    Only those with a result, as `final` gives it, and with the same `basis`; those groups alone
    in which two have a seed in common.
    """
    found: dict[Held, dict[str, Spot]] = {}
    for axis in axes:
        for spot, entry in entries.items():
            if not final(entry):
                continue
            others = tuple((key, value) for key, value in spot.point if key != axis)
            run = "" if axis == RUN else spot.run
            value = spot.run if axis == RUN else dict(spot.point).get(axis)
            if value is None:
                continue
            held = Held(
                axis, run, spot.partition, others, spot.normalizer, spot.batch_size, basis(spot)
            )
            found.setdefault(held, {})[value] = spot
    return {
        held: spots
        for held, spots in found.items()
        if any(
            final(entries[one]).keys() & final(entries[other]).keys()
            for one, other in combinations(spots.values(), 2)
        )
    }


def axis_contests(
    fields: Mapping[Held, Mapping[str, Spot]],
    entries: Mapping[Spot, Entry],
    comparisons: Sequence[Comparison],
    interval: Callable[[Entry], Interval],
) -> list[AxisContest]:
    """Return the contests of `fields`, of which `comparisons` holds the tests among others."""
    tests: dict[object, list[Comparison]] = {}
    for comparison in comparisons:
        tests.setdefault(comparison.group, []).append(comparison)
    made = []
    for held, spots in fields.items():
        intervals = {value: interval(entries[spot]) for value, spot in spots.items()}
        contest = Contest(
            held.batch_size,
            {value: of.mean for value, of in intervals.items()},
            tests.get(held, []),
            lost={value: entries[spot].lost for value, spot in spots.items() if entries[spot].lost},
            metric=entries[next(iter(spots.values()))].metric,
        )
        made.append(AxisContest(held, contest, intervals))
    return made


def axis_verdicts(contests: Sequence[AxisContest], so_far: bool = False) -> list[str]:
    """Return one sentence for each axis: which values the tests tell apart, and how often."""
    by_axis: dict[str, list[AxisContest]] = {}
    for contest in contests:
        by_axis.setdefault(contest.axis, []).append(contest)
    start = "So far, between" if so_far else "Between"
    return [f"{start} {_named(axis)}: {_sentence(of)}." for axis, of in by_axis.items()]


_PLACES_SHOWN = 3


def _named(axis: str) -> str:
    return "the runs" if axis == RUN else f"values of {axis}"


def _sentence(contests: Sequence[AxisContest]) -> str:
    pairs = [(contest, c) for contest in contests for c in contest.contest.comparisons]
    tested = [(contest, c) for contest, c in pairs if not math.isnan(c.p)]
    if not tested:
        return (
            f"with fewer than {FEWEST_SEEDS} common seeds no difference can be shown, all else "
            "being equal"
        )
    several = len({contest.held.partition for contest in contests}) > 1
    ahead: dict[tuple[str, str], list[tuple[AxisContest, Comparison]]] = {}
    for contest, c in tested:
        if c.significant:
            ahead.setdefault((c.first, c.second), []).append((contest, c))
    shown = sum(map(len, ahead.values()))
    total = _counted(len(tested))
    if not shown:
        return f"no difference is shown in any of {total}, all else being equal"
    clauses = [_clause(names, of, several) for names, of in ahead.items()]
    rest = len(tested) - shown
    if rest:
        clauses.append(f"in the other {rest} they cannot be told apart")
    return f"all else being equal, in {total}: {'; '.join(clauses)}"


def _clause(
    names: tuple[str, str], won: Sequence[tuple[AxisContest, Comparison]], several: bool
) -> str:
    """Who is ahead of whom, where and by how much; `several`: whether there are partitions."""
    held = [contest.held for contest, _ in won]
    places = [(of if several else of._replace(partition="")).label for of in held]
    if len(places) > _PLACES_SHOWN:
        shown = places[:_PLACES_SHOWN]
        places = [*shown, f"{len(places) - len(shown)} more"]
    metric = won[0][0].contest.metric
    margins = [c.difference for _, c in won]
    least, most = (formats.difference(of(margins), metric) for of in (min, max))
    unit = formats.difference_unit(metric)
    by = f"{least} {unit}" if least == most else f"{least} to {most} {unit}"
    first, second = (name or "empty" for name in names)
    return f"{first} is ahead of {second} in {len(won)}, by {by.rstrip()} ({'; '.join(places)})"


def _counted(pairs: int) -> str:
    return "1 comparison" if pairs == 1 else f"{pairs} comparisons"
