"""Several runs side by side: what may be tested between them, what not, and in what they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from fedkn.tables import shown
from simulations.report.axes import Spot
from simulations.report.entries import Entry
from simulations.report.settings import varied
from simulations.report.verdict import enumerated
from simulations.runs.axes import settings_of
from simulations.runs.folder import RunFolder
from simulations.runs.records import CellRecord

__all__ = ["Basis", "Difference", "SideBySide", "basis_of", "compared"]


@dataclass(frozen=True)
class Basis:
    """What two entries must share for a test between them to mean anything.

    Attributes:
        metric: by what they are judged, and which way.
        examples: the fingerprint of the data and the split that was measured on; of a run that
            recorded none the run itself.
        kept: the part of its images that a client keeps, to evaluate its own model on.
        told: whether the run recorded its data.
    """

    metric: object
    examples: object
    kept: float
    told: bool

    @property
    def of_global(self) -> object:
        """What counts for the global model."""
        return self.metric, self.examples

    @property
    def of_own(self) -> object:
        """What counts for the clients' own models."""
        return self.metric, self.examples, self.kept


@dataclass(frozen=True)
class Difference:
    """A setting that is no axis, and differs between runs: by run its values, as texts."""

    key: str
    values: Mapping[str, list[str]]


@dataclass(frozen=True)
class SideBySide:
    """Several runs in one report.

    Attributes:
        labels: of the runs. common: cells (by normalizer, batch size, partition, axes and seed)
            that all runs have. differences: settings beyond the axes in which common cells differ.
        untested: why runs are not tested against each other, in sentences.
    """

    labels: list[str]
    common: int
    differences: list[Difference]
    untested: list[str]


def basis_of(run: RunFolder, entry: Entry) -> Basis:
    """Return what the results of `entry` are measured by and on."""
    if not entry.cells:
        return Basis(entry.metric, None, 0.0, told=False)
    config = entry.cells[0].config
    data = run.data_of(config.data)
    told = data is not None and data.fingerprint is not None
    on = data.fingerprint if data is not None and told else str(run.path.resolve())
    return Basis(
        entry.metric,
        (on, config.evaluation.split, None if told else config.data),
        config.evaluation.client_fraction,
        told=told,
    )


def compared(
    runs: Sequence[tuple[str, RunFolder]],
    entries: Mapping[Spot, Entry],
    bases: Mapping[Spot, Basis],
    axes: Sequence[str],
) -> SideBySide:
    """Return what `runs`, by their labels, have in common and in what they differ."""
    labels = [label for label, _ in runs]
    by_run: dict[str, dict[tuple[object, ...], CellRecord]] = {label: {} for label in labels}
    spots: dict[str, dict[tuple[object, ...], Spot]] = {label: {} for label in labels}
    for spot, entry in entries.items():
        for cell in entry.cells:
            key = (*spot[1:], cell.config.seed)
            by_run[spot.run][key] = cell
            spots[spot.run][key] = spot
    common = set.intersection(*(set(of) for of in by_run.values()))
    untested = [
        reason
        for one, other in combinations(runs, 2)
        if (reason := _why_not(one, other, spots, bases))
    ]
    return SideBySide(labels, len(common), _differences(by_run, axes), untested)


def _why_not(
    one: tuple[str, RunFolder],
    other: tuple[str, RunFolder],
    spots: Mapping[str, Mapping[tuple[object, ...], Spot]],
    bases: Mapping[Spot, Basis],
) -> str:
    """Why two runs are not tested against each other, or not everywhere; empty where they are."""
    first, second = one[0], other[0]
    keys = [key for key in spots[first] if key in spots[second]]
    start = f"{first} and {second} are not tested against each other"
    if not keys:
        return (
            f"{start}: they have no cell in common (the same normalizer, batch size, partition, "
            "further axes and seed)"
        )
    pairs = [(bases[spots[first][key]], bases[spots[second][key]]) for key in keys]
    if metrics := [(a.metric, b.metric) for a, b in pairs if a.metric != b.metric]:
        names = [getattr(metric, "name", "") for metric in metrics[0]]
        return f"{start}: they are judged by different metrics ({' and '.join(names)})"
    silent = [
        label
        for label, told in (
            (first, all(a.told for a, _ in pairs)),
            (second, all(b.told for _, b in pairs)),
        )
        if not told
    ]
    if silent:
        return (
            f"{start}: {enumerated(silent)} recorded no fingerprint of the data, so that nobody "
            "knows whether they are the same"
        )
    if any(a.examples != b.examples for a, b in pairs):
        return f"{start}: {_changed(one, other, keys, spots)}"
    if any(a.kept != b.kept for a, b in pairs):
        return (
            f"The clients' own models of {first} and {second} are not tested against each other: "
            "their clients keep different parts of their images (evaluation.client_fraction)"
        )
    return ""


def _changed(
    one: tuple[str, RunFolder],
    other: tuple[str, RunFolder],
    keys: Sequence[tuple[object, ...]],
    spots: Mapping[str, Mapping[tuple[object, ...], Spot]],
) -> str:
    del keys, spots
    ours, theirs = one[1].data(), other[1].data()
    found = ours[0].summary.changes(theirs[0].summary) if ours and theirs else []
    reason = "their data differ" if found else "they were measured on different examples"
    return f"{reason}{f' ({found[0]})' if found else ''}"


def _differences(
    by_run: Mapping[str, Mapping[tuple[object, ...], CellRecord]], axes: Sequence[str]
) -> list[Difference]:
    """The settings in which cells that two or more runs have in common differ."""
    counted: dict[tuple[object, ...], int] = {}
    for of in by_run.values():
        for key in of:
            counted[key] = counted.get(key, 0) + 1
    values: dict[str, dict[str, list[str]]] = {}
    for label, of in by_run.items():
        for key, cell in of.items():
            if counted[key] < 2:
                continue
            for name, value in settings_of(cell.config).items():
                if varied(name) or name in axes:
                    continue
                known = values.setdefault(name, {}).setdefault(label, [])
                if (text := shown(value)) not in known:
                    known.append(text)
    return [
        Difference(name, by_label)
        for name, by_label in values.items()
        if len({tuple(sorted(of)) for of in by_label.values()}) > 1
    ]
