"""What a learning rate is judged by: the same in the search and in the report that shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from simulations.runs.results import ClientEvaluation

__all__ = ["LAST_EVALUATIONS", "SearchedCell", "rate_scores"]

LAST_EVALUATIONS = 3
"""Evaluations that a rate is judged by: one after a round of few clients is noisy."""


@dataclass(frozen=True)
class SearchedCell:
    """What came of one cell of a search.

    Attributes:
        evaluations: accuracy and loss of the global model on validation images after its last
            `LAST_EVALUATIONS` evaluated rounds, without those of the initial model.
        keeps_tensors: whether clients keep tensors of the model to themselves. Then the global
            model is no client's, and the cell is judged by their own ones.
        own: the clients' own models on their own images.
    """

    seed: int
    completed: bool
    evaluations: Sequence[tuple[float, float]]
    keeps_tensors: bool
    own: ClientEvaluation | None


def rate_scores(
    trials: Mapping[float, Sequence[SearchedCell]],
) -> dict[float, tuple[float, float]]:
    """Return accuracy and loss, means over the cells, by which each rate of a search is judged.

    Both are NaN where a cell failed or diverged. Where clients keep tensors, a client whose model
    could not be evaluated (as after diverging) counts as all wrong, so that no rate gains by losing
    its worst clients; one that could not be evaluated at any rate, having no such image, does not
    count.
    """
    clients: dict[int, set[int]] = {}
    for cells in trials.values():
        for cell in cells:
            if cell.own is not None:
                clients.setdefault(cell.seed, set()).update(c.client for c in cell.own.clients)
    scores = {}
    for rate, cells in trials.items():
        of_cells = [_score(cell, len(clients.get(cell.seed, ()))) for cell in cells]
        accuracy = _mean(accuracy for accuracy, _ in of_cells)
        loss = _mean(loss for _, loss in of_cells)
        finite = math.isfinite(accuracy) and math.isfinite(loss)
        scores[rate] = (accuracy, loss) if finite else (math.nan, math.nan)
    return scores


def _score(cell: SearchedCell, clients: int) -> tuple[float, float]:
    if not cell.completed:
        return math.nan, math.nan
    if cell.keeps_tensors:
        # Never by test images, also where a run folder has such a line.
        if cell.own is None or cell.own.split != "validation" or not cell.own.clients:
            return math.nan, math.nan
        return sum(client.accuracy for client in cell.own.clients) / clients, cell.own.loss
    return _mean(a for a, _ in cell.evaluations), _mean(loss for _, loss in cell.evaluations)


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every) if every else math.nan
