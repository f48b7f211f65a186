"""The learning rates that a run tried, as its search judged them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulations.report.entries import Entry
from simulations.runs.rate_scores import LAST_EVALUATIONS, SearchedCell, rate_scores
from simulations.runs.records import CellRecord

__all__ = ["Trial", "trials_of"]


@dataclass(frozen=True)
class Trial:
    """One learning rate that was tried.

    `accuracy`: its mean in validation, of whatever metric there is; NaN where it failed.

    `own`: it is that of the clients' own models, because they keep tensors.
    """

    learning_rate: float
    accuracy: float
    cells: int
    chosen: bool
    own: bool


def trials_of(entry: Entry, cells: Sequence[CellRecord]) -> list[Trial]:
    """Return the learning rates that were tried for `entry`, ascending.

    `cells` are all those of its partition and point.
    """
    by_rate: dict[float, list[SearchedCell]] = {}
    for cell in cells:
        train = cell.config.train
        key = (cell.config.normalizer.name, train.batch_size)
        if cell.purpose == "search" and key == (entry.normalizer, entry.batch_size):
            by_rate.setdefault(train.learning_rate, []).append(_searched(cell))
    scores = rate_scores(by_rate, entry.metric)
    chosen = {cell.config.train.learning_rate for cell in entry.cells}
    return [
        Trial(
            learning_rate=rate,
            accuracy=scores[rate][0],
            cells=len(by_rate[rate]),
            chosen=rate in chosen,
            own=any(of.keeps_tensors for of in by_rate[rate]),
        )
        for rate in sorted(scores)
    ]


def _searched(cell: CellRecord) -> SearchedCell:
    trained = [e for e in cell.evaluations if e.round and e.split == "validation"]
    return SearchedCell(
        seed=cell.config.seed,
        completed=cell.status == "completed",
        evaluations=[(e.value, e.loss) for e in trained[-LAST_EVALUATIONS:]],
        keeps_tensors=bool(cell.local_tensors),
        own=cell.client_evaluation,
    )
