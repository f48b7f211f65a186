"""Values by round, as the panels of curves draw them, and how far their axes reach."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedkn.tasks.metric import Metric
from simulations.report.entries import Entry

__all__ = ["Seeds", "loss_limits", "losses_by_round", "value_limits"]

Seeds = list[dict[int, float]]
"""One curve for each cell: a number by round."""


def losses_by_round(entry: Entry) -> tuple[Seeds, Seeds]:
    """Return the loss by round on what the clients train on, and on what is evaluated on.

    Of the completed cells; of the others while none is.
    """
    completed = [cell for cell in entry.cells if cell.status == "completed"]
    cells = completed or entry.cells
    trained = [{r.round: r.train_loss for r in cell.rounds} for cell in cells]
    evaluated = [
        {e.round: e.loss for e in cell.evaluations if e.split == cell.config.evaluation.split}
        for cell in cells
    ]
    return [c for c in trained if c], [c for c in evaluated if c]


def value_limits(curves: Sequence[dict[int, float]], metric: Metric) -> tuple[float, float]:
    """Return the limits of the values for all panels: the steep first third may leave them."""
    late = _late(curves)
    if not late:
        return _whole(metric)
    margin = max(0.05 * (max(late) - min(late)), 0.01 * max(abs(max(late)), abs(min(late))), 1e-9)
    return max(metric.lowest, min(late) - margin), min(metric.highest, max(late) + margin)


def loss_limits(curves: Sequence[dict[int, float]]) -> tuple[Metric, tuple[float, float]]:
    """Return the loss as a metric, and the limits of its axis for all panels.

    A loss that is nowhere below zero is taken for one that cannot be.
    """
    every = [value for curve in curves for value in curve.values() if math.isfinite(value)]
    lowest = 0.0 if min(every, default=0.0) >= 0 else -math.inf
    metric = Metric("loss", higher_is_better=False, lowest=lowest)
    low, high = value_limits(curves, metric)
    late = [value for value in _late(curves) if value > 0]
    # Of losses that differ by orders of magnitude the axis is logarithmic, and has no zero.
    return metric, (max(low, 0.8 * min(late)) if late and low >= 0 else low, high)


def _late(curves: Sequence[dict[int, float]]) -> list[float]:
    return [
        value
        for curve in curves
        for number, value in curve.items()
        if 3 * number >= max(curve) and math.isfinite(value)
    ]


def _whole(metric: Metric) -> tuple[float, float]:
    ends = (metric.lowest, metric.highest)
    return ends if all(map(math.isfinite, ends)) else (0.0, 1.0)
