"""What a learning rate is judged by: the same in the search and in the report that shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedkn.tasks.metric import Metric
from simulations.runs.results import ClientEvaluation

__all__ = ["LAST_EVALUATIONS", "SearchedCell", "rate_scores"]

LAST_EVALUATIONS = 3
"""Evaluations that a rate is judged by: one after a round of few clients is noisy."""


@dataclass(frozen=True)
class SearchedCell:
    """What came of one cell of a search.

    Attributes:
        evaluations: the deciding metric's value and the loss of the global model on validation
            examples after its last `LAST_EVALUATIONS` evaluated rounds, without those of the
            initial model.
        keeps_tensors: whether clients keep tensors of the model to themselves. Then the global
            model is no client's, and the cell is judged by their own ones.
        own: the clients' own models on their own examples.
    """

    seed: int
    completed: bool
    evaluations: Sequence[tuple[float, float]]
    keeps_tensors: bool
    own: ClientEvaluation | None


def rate_scores(
    trials: Mapping[float, Sequence[SearchedCell]], metric: Metric
) -> dict[float, tuple[float, float]]:
    """Return value and loss, means over the cells, by which each rate of a search is judged.

    The values are of `metric`, which says whether higher is better. Both are NaN where a cell
    failed or diverged. Where clients keep tensors, a client whose model could not be evaluated (as
    after diverging) counts with the worst possible value (all wrong), where there is no such bound
    with the worst of all clients' at all rates: so no rate gains by losing its worst clients. One
    that could not be evaluated at any rate, having no such example, does not count.
    """
    clients: dict[int, set[int]] = {}
    worst = metric.worst
    for cell in (cell for cells in trials.values() for cell in cells):
        if cell.own is not None:
            values = _values(cell.own)
            clients.setdefault(cell.seed, set()).update(values)
            if math.isinf(metric.worst) and values:
                seen = [*values.values(), *([worst] if math.isfinite(worst) else [])]
                worst = min(seen, key=lambda value: metric.sign * value)
    scores = {}
    for rate, cells in trials.items():
        of_cells = [_score(cell, len(clients.get(cell.seed, ())), worst) for cell in cells]
        value = _mean(value for value, _ in of_cells)
        loss = _mean(loss for _, loss in of_cells)
        finite = math.isfinite(value) and math.isfinite(loss)
        scores[rate] = (value, loss) if finite else (math.nan, math.nan)
    return scores


def _values(own: ClientEvaluation) -> dict[int, float]:
    """Return by client the value of its own model, of those that have one."""
    return {of.client: of.value for of in own.clients if not math.isnan(of.value)}


def _score(cell: SearchedCell, clients: int, worst: float) -> tuple[float, float]:
    if not cell.completed:
        return math.nan, math.nan
    if cell.keeps_tensors:
        # Never by test images, also where a run folder has such a line.
        own = cell.own
        values = _values(own) if own is not None and own.split == "validation" else {}
        if own is None or not values:
            return math.nan, math.nan
        lost = (clients - len(values)) * worst if clients > len(values) else 0.0
        return (sum(values.values()) + lost) / clients, own.loss
    return _mean(value for value, _ in cell.evaluations), _mean(
        loss for _, loss in cell.evaluations
    )


def _mean(values: Iterable[float]) -> float:
    every = list(values)
    return sum(every) / len(every) if every else math.nan
