"""By which metric cells are judged, where some of them did not come to say so."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Protocol

from fedkn.tasks.metric import ACCURACY, Metric

__all__ = ["judged_by"]


class _Judged(Protocol):
    @property
    def metric(self) -> Metric: ...

    @property
    def evaluations(self) -> Sized: ...


def judged_by(cells: Iterable[_Judged]) -> Metric:
    """Return the metric of the first of `cells` that was evaluated.

    One that failed before its server said anything tells nothing. Accuracy where none tells.
    """
    return next((cell.metric for cell in cells if len(cell.evaluations)), ACCURACY)
