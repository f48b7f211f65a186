"""The learning-rate search: each group's rate is chosen on validation images, never on test ones.

A pure function of the grid and of what metrics.jsonl holds, so that a resumed run decides as the
run that was killed would have, and does nothing twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedkn.tasks.metric import Metric
from simulations.comparison.grid import Cell, GridConfig, Group, search_cells
from simulations.runs.history import CellHistory, History
from simulations.runs.metric import judged_by
from simulations.runs.rate_scores import LAST_EVALUATIONS, SearchedCell, rate_scores

__all__ = ["MOST_EXTENSIONS", "Search", "Trial", "search"]

MOST_EXTENSIONS = 2
"""How many rates beyond either end of the grid the search may try."""


@dataclass(frozen=True)
class Trial:
    """One learning rate that was tried, its cells having ended.

    `value` (of the metric) and `loss` are means over the search seeds of the last evaluations on
    the validation split, of the clients' own models where they keep tensors (see `rate_scores`);
    both NaN where a cell failed or diverged.
    """

    learning_rate: float
    value: float
    loss: float


@dataclass(frozen=True)
class Search:
    """The state of a group's search. It is over once nothing is pending.

    Attributes:
        cells: every cell of the search as far as it is known.
        pending: those that must end before the next decision.
        trials: the rates tried, ascending; empty while cells are pending.
        chosen: the rate; None while cells are pending, or where every trial failed.
        at_edge: the chosen rate is the lowest or highest tried, as far as the search may go.
    """

    cells: tuple[Cell, ...] = ()
    pending: tuple[Cell, ...] = ()
    trials: tuple[Trial, ...] = ()
    chosen: float | None = None
    at_edge: bool = False


def search(grid: GridConfig, group: Group, history: History) -> Search:
    """Return how far the search for `group`'s learning rate is.

    The rate with the best value of the metric wins, the highest or the lowest as the metric says,
    of equal ones that with the smaller loss. While the best
    is at an end of the rates tried, the next one beyond it is tried too, at most two at each end.
    A single rate in the grid is taken as it is.
    """
    rates = sorted(grid.compare.learning_rates)
    if len(rates) == 1:
        return Search(chosen=rates[0])
    room = {-1: MOST_EXTENSIONS, 1: MOST_EXTENSIONS}
    while True:
        cells = tuple(cell for rate in rates for cell in search_cells(grid, group, rate))
        pending = tuple(cell for cell in cells if not history[cell.id].status)
        if pending:
            return Search(cells, pending)
        metric = judged_by(history[cell.id] for cell in cells)
        trials = _trials(grid, group, rates, history, metric)
        valid = [trial for trial in trials if not math.isnan(trial.value)]
        if not valid:
            return Search(cells, trials=trials)
        best = max(valid, key=lambda trial: (metric.sign * trial.value, -trial.loss)).learning_rate
        side = -1 if best == rates[0] else 1 if best == rates[-1] else 0
        if not side or not room[side]:
            return Search(cells, trials=trials, chosen=best, at_edge=bool(side))
        room[side] -= 1
        rates = sorted([*rates, _beyond(rates, side)])


def _trials(
    grid: GridConfig, group: Group, rates: list[float], history: History, metric: Metric
) -> tuple[Trial, ...]:
    cells = {
        rate: [
            _searched(cell.config.seed, history[cell.id])
            for cell in search_cells(grid, group, rate)
        ]
        for rate in rates
    }
    return tuple(Trial(rate, *score) for rate, score in rate_scores(cells, metric).items())


def _searched(seed: int, cell: CellHistory) -> SearchedCell:
    return SearchedCell(
        seed=seed,
        completed=cell.status == "completed",
        evaluations=cell.last_evaluations(LAST_EVALUATIONS),
        keeps_tensors=cell.keeps_tensors,
        own=cell.own,
    )


def _beyond(rates: list[float], side: int) -> float:
    """Return the next rate beyond the lowest (-1) or highest (1), going on as the grid does.

    With three rates or more the step is the last but one, so that 0.01 0.03 0.1 0.3 goes on with
    1 above and with 0.003 below.
    """
    end, second, *rest = rates if side < 0 else rates[::-1]
    step = second / rest[0] if rest else end / second
    return float(f"{end * step:.2g}")
