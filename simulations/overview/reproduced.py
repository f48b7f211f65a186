"""A published table that was run again: its rows beside the paper's, and tested where they may be.

Rows are compared with each other where nothing but the row differs: the same test examples and
metric, partition, batch size, rounds and noise. All pairs of a table at a scale are one family for
Holm's correction. They are tested on the last round: the best one is chosen on test examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from simulations.overview.collection import TableRuns
from simulations.report.axes import AxisContest, Held
from simulations.report.entries import Entry
from simulations.report.reading import ReadRun, read_run
from simulations.report.side_by_side import basis_of
from simulations.report.verdict import Contest
from simulations.reproduction.outcome import (
    Outcome,
    is_of_other_images,
    nothing_of,
    outcome_of,
)
from simulations.runs.axes import Point
from simulations.runs.statistics import Comparison, Interval, compare_all_pairs

__all__ = ["ROW", "Agreement", "Line", "Reproduced", "reproduced"]

ROW = "row"
"""What is varied where rows of a table are compared."""


@dataclass(frozen=True)
class Line:
    """One row of the table.

    `entry` is what its run has, None where it was not begun; `keeps`: clients keep tensors, which
    the global model lacks, so that it is not tested against others. `published` is the paper's
    figure as a fraction, None where there is none, or where the images are not the paper's.
    """

    outcome: Outcome
    entry: Entry | None
    folder: str
    keeps: bool
    published: float | None = None

    @property
    def label(self) -> str:
        """What the row is called."""
        return self.outcome.row.label

    def ours(self, reading: str) -> Interval:
        """Return our figure, of the best or the last round."""
        return self.outcome.best if reading == "best" else self.outcome.last

    def difference(self, reading: str) -> float:
        """Return ours less the published figure, as a fraction; NaN where there is one alone."""
        return math.nan if self.published is None else self.ours(reading).mean - self.published

    def inside(self, reading: str) -> bool | None:
        """Whether the published figure lies in our 95% interval; None where that is not known."""
        ours = self.ours(reading)
        return (
            None
            if self.published is None or ours.n < 2
            else ours.low <= self.published <= ours.high
        )


@dataclass(frozen=True)
class Agreement:
    """In how many pairs of comparable rows the published order is ours.

    Attributes:
        pairs: with different published figures, and figures of ours. same: in the same order.
        apart: of these pairs, told apart by our tests. apart_same: in the same order too.
    """

    pairs: int
    same: int
    apart: int
    apart_same: int


@dataclass(frozen=True)
class Reproduced:
    """A published table at one scale: every row, and what may be compared with what."""

    of: TableRuns
    lines: list[Line]
    contests: list[AxisContest]
    members: list[list[Line]]
    comparisons: list[Comparison]

    @property
    def outcomes(self) -> list[Outcome]:
        """What came of all rows."""
        return [line.outcome for line in self.lines]

    def agreement(self) -> Agreement:
        """Return how far the published order is ours."""
        reading = self.of.table.reading
        found = []
        for contest, lines in zip(self.contests, self.members, strict=True):
            for one, other in combinations(lines, 2):
                published = _apart(one.published, other.published)
                ours = one.ours(reading).mean - other.ours(reading).mean
                if published and not math.isnan(ours):
                    tested = next(
                        (c for c in contest.contest.comparisons if c.has(one.label, other.label)),
                        None,
                    )
                    found.append((published * ours > 0, bool(tested and tested.significant)))
        return Agreement(
            pairs=len(found),
            same=sum(same for same, _ in found),
            apart=sum(apart for _, apart in found),
            apart_same=sum(same and apart for same, apart in found),
        )


def reproduced(of: TableRuns) -> Reproduced:
    """Digest the runs of a table. Raises UserError where one of them is damaged."""
    lines = []
    fields: dict[Held, dict[str, tuple[Line, Entry]]] = {}
    for row in of.table.rows:
        run = of.rows.get(row.name)
        if run is None:
            lines.append(Line(nothing_of(row), None, "", keeps=False))
            continue
        read = read_run(run, row.label)
        entry = _entry(read)
        keeps = entry.normalizer in read.keepers
        outcome = outcome_of(row, run)
        other = row.published is None or is_of_other_images(of.table, outcome)
        published = None if other or row.published is None else row.published / 100
        line = Line(outcome, entry, run.path.name, keeps, published)
        lines.append(line)
        if entry.final and not keeps:
            fields.setdefault(_held(read, entry), {})[row.label] = (line, entry)
    scores = {
        held: {label: entry.final for label, (_, entry) in found.items()}
        for held, found in fields.items()
    }
    metrics = {held: next(iter(found.values()))[1].metric for held, found in fields.items()}
    comparisons = compare_all_pairs(scores, metrics)
    return Reproduced(
        of=of,
        lines=lines,
        contests=[_contest(held, found, comparisons) for held, found in fields.items()],
        members=[[line for line, _ in found.values()] for found in fields.values()],
        comparisons=comparisons,
    )


def _entry(read: ReadRun) -> Entry:
    """The one entry of a row's run: it has one group."""
    every = [entry for of_place in read.places.values() for entry in of_place.values()]
    return max(every, key=lambda entry: len(entry.cells))


def _held(read: ReadRun, entry: Entry) -> Held:
    config = entry.cells[0].config
    point: Point = ()
    if config.privacy.mechanism != "none":
        point = (("privacy.noise_multiplier", f"{config.privacy.noise_multiplier:g}"),)
    basis = (basis_of(read.folder, entry).of_global, config.rounds)
    partition = entry.cells[0].partition
    return Held(ROW, "", partition, point, "", entry.batch_size, basis)


def _contest(
    held: Held, found: Mapping[str, tuple[Line, Entry]], comparisons: Sequence[Comparison]
) -> AxisContest:
    entries = {label: entry for label, (_, entry) in found.items()}
    intervals = {label: entry.accuracy for label, entry in entries.items()}
    contest = Contest(
        held.batch_size,
        {label: of.mean for label, of in intervals.items()},
        [c for c in comparisons if c.group == held],
        lost={label: entry.lost for label, entry in entries.items() if entry.lost},
        metric=next(iter(entries.values())).metric,
        entrants=len(entries),
    )
    return AxisContest(held, contest, intervals)


def _apart(one: float | None, other: float | None) -> float:
    return 0.0 if one is None or other is None else one - other
