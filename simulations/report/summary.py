"""Runs digested: what every table and figure of the report shows, computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from fedkn.errors import UserError
from fedkn.tasks.metric import Metric
from simulations.report.axes import (
    NORMALIZER,
    AxisContest,
    Held,
    Spot,
    axis_contests,
    axis_verdicts,
    fields_of,
)
from simulations.report.contests import contest, own_contest
from simulations.report.effects import Effect, effect_sentences, effects_of
from simulations.report.entries import Entry
from simulations.report.holdings import ClientTable, client_tables
from simulations.report.reading import ReadRun, read_run, union
from simulations.report.side_by_side import SideBySide, basis_of, compared
from simulations.report.trials import Trial, trials_of
from simulations.report.verdict import Contest, verdicts
from simulations.runs.axes import RUN, Point, point_label, point_of
from simulations.runs.folder import RunFolder
from simulations.runs.records import CellRecord, GridRecord
from simulations.runs.statistics import Comparison, Interval, compare_all_pairs

__all__ = ["Digest", "RunSummary", "Section", "digest", "summarize"]

T = TypeVar("T")


@dataclass(frozen=True)
class Section:
    """One partition of a run at one point of its further axes: the normalizers by batch size.

    `contests` are those of the global model on the test images, without `keepers`: the normalizers
    that keep tensors on the clients, whose global model is no client's. `own_contests` are those of
    the clients' own models, of all normalizers; empty where no own model was evaluated.
    """

    partition: str
    point: Point
    metric: Metric
    normalizers: list[str]
    batch_sizes: list[int]
    target: float
    entries: dict[tuple[str, int], Entry]
    keepers: list[str]
    contests: list[Contest]
    own_contests: list[Contest]
    trials: dict[tuple[str, int], list[Trial]]
    tables: list[ClientTable]

    @property
    def label(self) -> str:
        """The partition and the point in words."""
        return ", ".join(filter(None, (self.partition, point_label(self.point))))

    @property
    def ended(self) -> bool:
        """Whether all its cells have."""
        return all(entry.ended >= entry.planned for entry in self.entries.values())

    @property
    def verdicts(self) -> list[str]:
        """The verdict, sentence by sentence."""
        return verdicts(self.contests, self.own_contests, self.keepers, so_far=not self.ended)

    @property
    def verdict(self) -> str:
        """The verdict."""
        return " ".join(self.verdicts)

    def ranked(self, batch_size: int) -> list[Entry]:
        """Return the entries of a batch size, best global mean first.

        Then come those of `keepers`, and those without a result last.
        """
        entries = [self.entries[name, batch_size] for name in self.normalizers]

        def place(entry: Entry) -> tuple[bool, bool, float]:
            mean = entry.metric.sign * entry.accuracy.mean if entry.final else 0.0
            return not entry.final, entry.normalizer in self.keepers, -mean

        return sorted(entries, key=place)


@dataclass(frozen=True)
class RunSummary:
    """One run folder, digested. `label` tells it from the others of the same report.

    `comparisons` are all of its tests, along further axes too, `own_comparisons` those of the
    clients' own models; `axis_contests` and `own_axis_contests` are those along its further axes.
    `effects` and `own_effects` are what each setting is worth, averaged over all others.
    """

    folder: RunFolder
    label: str
    grid: GridRecord
    metric: Metric
    cells: list[CellRecord]
    damaged_lines: int
    planned: int
    sections: list[Section]
    comparisons: list[Comparison]
    own_comparisons: list[Comparison]
    axis_contests: list[AxisContest]
    own_axis_contests: list[AxisContest]
    effects: list[Effect]
    own_effects: list[Effect]

    @property
    def results(self) -> list[CellRecord]:
        """The cells that measure, without those of the learning-rate search."""
        return [cell for cell in self.cells if cell.purpose == "result"]

    @property
    def ended(self) -> int:
        """Result cells that have ended, in whatever way."""
        return sum(cell.status != "unfinished" for cell in self.results)

    @property
    def partial(self) -> str:
        """What is still missing, in words; empty for a run that is complete."""
        missing = self.planned - self.ended
        if missing <= 0:
            return ""
        under_way = sum(cell.status == "unfinished" for cell in self.results)
        text = f"Partial: {self.ended} of {self.planned} result cells have ended"
        if under_way:
            text += f", {under_way} started without ending"
        return f"{text}. Numbers below are those of the cells that have ended."

    @property
    def axis_verdicts(self) -> list[str]:
        """What the further axes show, sentence by sentence."""
        so_far = bool(self.partial)
        return [
            *_of_both(self.axis_contests, self.own_axis_contests, so_far=so_far),
            *effect_sentences(self.effects, so_far=so_far),
            *_on_own(effect_sentences(self.own_effects, so_far=so_far)),
        ]


@dataclass(frozen=True)
class Digest:
    """The runs of a report, and what setting them side by side shows, where there are several.

    All tests of the report are one family, those of the clients' own models another.
    """

    runs: list[RunSummary]
    beside: SideBySide | None
    contests: list[AxisContest]
    own_contests: list[AxisContest]

    @property
    def verdicts(self) -> list[str]:
        """What the runs show against each other, sentence by sentence."""
        return _of_both(self.contests, self.own_contests, so_far=any(r.partial for r in self.runs))


class _Tests(NamedTuple):
    """The tests of a family, within places and along axes; and the effects, by run."""

    comparisons: list[Comparison]
    fields: dict[Held, dict[str, Spot]]
    effects: dict[str, list[Effect]]


def summarize(runs: Sequence[RunFolder]) -> list[RunSummary]:
    """Digest run folders for one report. Raises UserError if none is given, or one twice."""
    return digest(runs).runs


def digest(folders: Sequence[RunFolder]) -> Digest:
    """Digest run folders for one report, and compare them with each other where they are several.

    Raises UserError if none is given, or one twice.
    """
    if not folders:
        raise UserError("no run given: name at least one run folder")
    if len({folder.path.resolve() for folder in folders}) < len(folders):
        raise UserError("the same run folder is given twice")
    names = [folder.grid.name for folder in folders]
    runs = [
        read_run(folder, name if names.count(name) == 1 else f"{name} ({folder.path})")
        for folder, name in zip(folders, names, strict=True)
    ]
    axes = union(*(run.grid.axes for run in runs))
    entries = {
        Spot(run.label, partition, _point(entry, axes, point), name, size): entry
        for run in runs
        for (partition, point), of_place in run.places.items()
        for (name, size), entry in of_place.items()
    }
    keepers = {run.label: run.keepers for run in runs}
    folder_of = {run.label: run.folder for run in runs}
    bases = {spot: basis_of(folder_of[spot.run], entry) for spot, entry in entries.items()}
    along = [*axes, RUN] if len(runs) > 1 else axes
    shared = _tests(
        {spot: e for spot, e in entries.items() if spot.normalizer not in keepers[spot.run]},
        along,
        _final,
        lambda spot: bases[spot].of_global,
    )
    own = _tests(entries, along, _own_final, lambda spot: bases[spot].of_own)
    return Digest(
        runs=[_summary(run, entries, shared, own) for run in runs],
        beside=compared([(run.label, run.folder) for run in runs], entries, bases, axes)
        if len(runs) > 1
        else None,
        contests=_contests(shared, entries, _interval, lambda held: held.axis == RUN),
        own_contests=_contests(own, entries, _own_interval, lambda held: held.axis == RUN),
    )


def _of_both(
    contests: Sequence[AxisContest], own: Sequence[AxisContest], *, so_far: bool
) -> list[str]:
    return [*axis_verdicts(contests, so_far), *_on_own(axis_verdicts(own, so_far))]


def _on_own(sentences: Sequence[str]) -> list[str]:
    return [f"On the clients' own images: {text[0].lower()}{text[1:]}" for text in sentences]


def _final(entry: Entry) -> Mapping[int, float]:
    return entry.final


def _own_final(entry: Entry) -> Mapping[int, float]:
    return entry.own.final if entry.own else {}


def _point(entry: Entry, axes: Sequence[str], own: Point) -> Point:
    """Where an entry stands on the axes of all runs of the report."""
    return point_of(entry.cells[0].config, axes) if entry.cells else own


def _tests(
    entries: Mapping[Spot, Entry],
    axes: Sequence[str],
    final: Callable[[Entry], Mapping[int, float]],
    basis: Callable[[Spot], object],
) -> _Tests:
    """All pairs of normalizers within each place and batch size, and of values along each axis."""
    groups: dict[object, dict[str, Mapping[int, float]]] = {}
    metrics: dict[object, Metric] = {}
    for spot, entry in entries.items():
        if by_seed := final(entry):
            group = _group(spot)
            groups.setdefault(group, {})[spot.normalizer] = by_seed
            metrics[group] = entry.metric
    fields = fields_of(entries, axes, final, basis)
    for held, spots in fields.items():
        groups[held] = {value: final(entries[spot]) for value, spot in spots.items()}
        metrics[held] = entries[next(iter(spots.values()))].metric
    effects = {
        run: effects_of({at: e for at, e in entries.items() if at.run == run}, final, basis)
        for run in dict.fromkeys(spot.run for spot in entries)
    }
    return _Tests(compare_all_pairs(groups, metrics), fields, effects)


def _group(spot: Spot) -> Held:
    return Held(NORMALIZER, spot.run, spot.partition, spot.point, "", spot.batch_size)


def _interval(entry: Entry) -> Interval:
    return entry.accuracy


def _contests(
    tests: _Tests,
    entries: Mapping[Spot, Entry],
    interval: Callable[[Entry], Interval],
    wanted: Callable[[Held], bool],
) -> list[AxisContest]:
    fields = {held: spots for held, spots in tests.fields.items() if wanted(held)}
    return axis_contests(fields, entries, tests.comparisons, interval)


def _own_interval(entry: Entry) -> Interval:
    return entry.own.accuracy if entry.own else entry.accuracy


def _summary(
    run: ReadRun, entries: Mapping[Spot, Entry], shared: _Tests, own: _Tests
) -> RunSummary:
    of_place = {id(entry): spot for spot, entry in entries.items() if spot.run == run.label}
    sections = []
    for (partition, point), of in run.places.items():
        spots = {key: of_place[id(entry)] for key, entry in of.items()}
        sections.append(_section(run, (partition, point), spots, (shared, own)))

    def along(held: Held) -> bool:
        return held.axis != RUN and held.run == run.label

    results = [cell for cell in run.cells if cell.purpose == "result"]
    return RunSummary(
        folder=run.folder,
        label=run.label,
        grid=run.grid,
        metric=run.metric,
        cells=run.cells,
        damaged_lines=run.damaged_lines,
        planned=max(
            len(results), sum(e.planned for of in run.places.values() for e in of.values())
        ),
        sections=sections,
        comparisons=shared.comparisons,
        own_comparisons=own.comparisons,
        axis_contests=_contests(shared, entries, _interval, along),
        own_axis_contests=_contests(own, entries, _own_interval, along),
        effects=shared.effects.get(run.label, []),
        own_effects=own.effects.get(run.label, []),
    )


def _section(
    run: ReadRun,
    place: tuple[str, Point],
    spots: Mapping[tuple[str, int], Spot],
    tests: tuple[_Tests, _Tests],
) -> Section:
    partition, point = place
    entries = run.places[place]
    sizes = union([size for _, size in entries])
    names = union([name for name, _ in entries])
    here = [
        cell
        for cell in run.cells
        if cell.partition == partition and point_of(cell.config, run.grid.axes) == point
    ]
    targets = [cell.target for cell in here]
    by_size = {size: [e for (_, of), e in entries.items() if of == size] for size in sizes}
    groups = {size: _group(spots[names[0], size]) for size in sizes}
    of_global, of_own = (
        {size: [c for c in family.comparisons if c.group == groups[size]] for size in sizes}
        for family in tests
    )
    metric = next((entry.metric for entry in entries.values() if entry.cells), run.metric)
    return Section(
        partition=partition,
        point=point,
        metric=metric,
        normalizers=names,
        batch_sizes=sizes,
        target=targets[0] if targets else math.nan,
        entries=entries,
        keepers=[name for name in names if name in run.keepers],
        contests=[contest(size, by_size[size], run.keepers, of_global[size]) for size in sizes],
        own_contests=[own_contest(size, by_size[size], of_own[size]) for size in sizes]
        if any(entry.own for entry in entries.values())
        else [],
        trials={
            key: trials for key, entry in entries.items() if (trials := trials_of(entry, here))
        },
        tables=client_tables(run.folder, partition, [c for c in here if c.purpose == "result"]),
    )
