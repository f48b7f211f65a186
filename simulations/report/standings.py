"""How those that compete stand to the best of them: normalizers, values of an axis, runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulations.report import formats
from simulations.report.axes import AxisContest
from simulations.report.verdict import Contest
from simulations.runs.statistics import Comparison, Interval

__all__ = ["Field", "Place", "fields", "standing"]


@dataclass(frozen=True)
class Place:
    """One that competes: its name, its mean, how it stands, and the test against the best."""

    name: str
    interval: Interval
    standing: str
    test: Comparison | None


@dataclass(frozen=True)
class Field:
    """What competes along one axis, all else being equal; the best first."""

    label: str
    contest: Contest
    places: list[Place]


def standing(contest: Contest, name: str) -> str:
    """Return how a name stands to the best mean, in words."""
    metric = contest.metric
    if name == contest.winner:
        return "best mean" if len(contest.means) > 1 else ""
    apart = contest.means[name] - contest.means[contest.winner]
    sign = "−" if apart < 0 else "+"
    text = f"{sign}{formats.difference_with_unit(abs(apart), metric)}"
    if name in contest.behind():
        return text
    return f"{text}, not told apart" if contest.tested else text


def fields(contests: Sequence[AxisContest]) -> dict[str, list[Field]]:
    """Return by axis what competes along it."""
    found: dict[str, list[Field]] = {}
    for of in contests:
        contest = of.contest
        tests = {
            name: test
            for test in contest.against_winner()
            for name in (test.first, test.second)
            if name != contest.winner
        }
        places = [
            Place(name, of.intervals[name], standing(contest, name), tests.get(name))
            for name in _best_first(contest)
        ]
        found.setdefault(of.axis, []).append(Field(of.held.label, contest, places))
    return found


def _best_first(contest: Contest) -> list[str]:
    def place(name: str) -> float:
        return -contest.metric.sign * contest.means[name]

    return sorted(contest.means, key=place)
