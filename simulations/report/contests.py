"""Who competes in one place of a report at one batch size, and who is lost to it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedkn.tasks.metric import ACCURACY, Metric
from simulations.report.entries import Entry
from simulations.report.verdict import Contest
from simulations.runs.statistics import Comparison

__all__ = ["contest", "own_contest"]


def contest(
    batch_size: int,
    entries: Sequence[Entry],
    keepers: Collection[str],
    comparisons: list[Comparison],
) -> Contest:
    """Return the contest of the global models, without the `keepers`, whose is no client's."""
    entries = [entry for entry in entries if entry.normalizer not in keepers]
    return Contest(
        batch_size=batch_size,
        means={e.normalizer: e.accuracy.mean for e in entries if e.final},
        comparisons=comparisons,
        lost={e.normalizer: e.lost for e in entries if e.lost},
        untrained=[e.normalizer for e in entries if e.cells and e.lost == len(e.cells)],
        entrants=len(entries),
        metric=_judged(entries),
    )


def own_contest(
    batch_size: int, entries: Sequence[Entry], comparisons: list[Comparison]
) -> Contest:
    """Return the contest of the clients' own models."""
    results = {e.normalizer: e.own for e in entries if e.own}
    lost = {e.normalizer: e.ended - (len(e.own.final) if e.own else 0) for e in entries}
    return Contest(
        batch_size=batch_size,
        means={name: own.accuracy.mean for name, own in results.items()},
        comparisons=comparisons,
        lost={name: cells for name, cells in lost.items() if cells},
        untrained=[e.normalizer for e in entries if e.cells and lost[e.normalizer] == len(e.cells)],
        failed_clients={name: own.failed for name, own in results.items() if own.failed},
        entrants=len(entries),
        metric=_judged(entries),
    )


def _judged(entries: Sequence[Entry]) -> Metric:
    """The metric of a contest of `entries`; of none any will do."""
    return entries[0].metric if entries else ACCURACY
