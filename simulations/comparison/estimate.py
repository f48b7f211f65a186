"""How long a run will still take, from the rounds measured so far."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

from simulations.comparison.grid import Cell
from simulations.comparison.scheduler import Board, expected_cost
from simulations.runs.axes import Point

__all__ = ["Estimator"]


class Estimator:
    """Estimates the seconds left. Ask it at every update: it learns from the cells it sees run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin: float | None = None
        """When the first cell began: the start of the workers comes once, and is not scaled."""
        self._seen: dict[str, Cell] = {}
        self._before: dict[str, float] = {}
        """Round seconds that a cell had behind it when this process took it up."""

    def seconds_left(self, board: Board) -> float | None:
        """Return the estimate, None until a round was measured.

        A cell takes its remaining rounds times the seconds of a round with the same normalizer,
        batch size and point of the axes, scaled by `expected_cost`; of what was not measured yet,
        those of all rounds.
        What rounds do not contain (evaluation, building a model) is added in proportion.
        """
        history = board.history
        for cell in board.running:
            if cell.id not in self._seen:
                self._seen[cell.id] = cell
                self._before[cell.id] = history[cell.id].seconds
            if self._begin is None and history[cell.id].begun:
                self._begin = self._clock()
        spent: dict[_Kind, float] = defaultdict(float)
        cost: dict[_Kind, float] = defaultdict(float)
        fresh = 0.0
        for cell in self._seen.values():
            record = history[cell.id]
            spent[_kind(cell)] += record.seconds
            cost[_kind(cell)] += _round_cost(cell) * record.timed_rounds
            fresh += record.seconds - self._before[cell.id]
        if not fresh or self._begin is None:
            return None
        overall = sum(spent.values()) / sum(cost.values())
        rate = {kind: spent[kind] / cost[kind] if cost[kind] else overall for kind in cost}

        def left(cell: Cell) -> float:
            rounds = cell.config.rounds - history[cell.id].round
            return rate.get(_kind(cell), overall) * _round_cost(cell) * rounds

        total = sum(left(cell) for cell in (*board.running, *board.waiting))
        longest = max((left(cell) for cell in board.running), default=0.0)
        width = min(board.workers, len(board.running)) or 1
        overhead = max(1.0, (self._clock() - self._begin) * width / fresh)
        return overhead * max(total / board.workers, longest)


_Kind = tuple[str, int, Point]


def _kind(cell: Cell) -> _Kind:
    return cell.group.normalizer, cell.group.batch_size, cell.group.point


def _round_cost(cell: Cell) -> float:
    return expected_cost(cell.config) / cell.config.rounds
