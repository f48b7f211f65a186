"""What metrics.jsonl tells of every cell so far, kept up to date while a run is under way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkn.tasks.metric import ACCURACY, Metric
from simulations.runs.results import (
    ClientEvaluation,
    client_evaluation_of,
    metric_of,
    number,
)
from simulations.runs.tail import MetricsTail

__all__ = ["CellHistory", "History"]


@dataclass
class CellHistory:
    """One cell, as far as it got."""

    status: str = ""
    """completed, failed or untrainable; empty until the cell has ended."""
    error: str = ""
    metric: Metric = ACCURACY
    """By which the cell is judged."""
    begun: bool = False
    round: int = 0
    """The last round that ended."""
    seconds: float = 0.0
    """Spent on `timed_rounds` rounds."""
    timed_rounds: int = 0
    evaluations: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Value of `metric` and loss after each evaluated round, 0 being the initial model."""
    keeps_tensors: bool = False
    """Whether clients keep tensors of the model to themselves."""
    own: ClientEvaluation | None = None
    """The clients' own models after the last round."""
    warnings: list[str] = field(default_factory=list)
    """What went wrong beside the run, such as an observer that failed."""
    split: str = ""
    """The images that the cell is to be judged on; the others choose within it."""

    def last_evaluations(self, count: int) -> list[tuple[float, float]]:
        """Return value and loss of the last `count` evaluated rounds, oldest first.

        The initial model is none of them.
        """
        rounds = sorted(number for number in self.evaluations if number)
        return [self.evaluations[number] for number in rounds[-count:]]


class History:
    """All cells of one metrics.jsonl; `poll` takes in what was appended since the last one."""

    def __init__(self, metrics: Path) -> None:
        self._tail = MetricsTail(metrics)
        self._cells: dict[str, CellHistory] = {}

    def __getitem__(self, cell: str) -> CellHistory:
        return self._cells.get(cell) or CellHistory()

    @property
    def skipped(self) -> int:
        """How many lines were passed over so far because they could not be read."""
        return self._tail.skipped

    def poll(self) -> None:
        """Take in the lines appended to metrics.jsonl since the last call."""
        self._take(self._tail.poll())

    def forget_end(self, cell: str) -> None:
        """Treat a cell that ended as one that did not, so that it is run again."""
        if cell in self._cells:
            self._cells[cell].status = self._cells[cell].error = ""

    def _take(self, lines: Iterable[Mapping[str, Any]]) -> None:
        for line in lines:
            cell = self._cells.setdefault(line["cell"], CellHistory())
            match line["kind"]:
                case "start":
                    cell.begun = True
                    cell.status = cell.error = ""
                    cell.split = {"search": "validation", "result": "test"}[line["purpose"]]
                    cell.metric = metric_of(line)
                    cell.keeps_tensors = bool(line.get("local_tensors"))
                case "resume":
                    cell.begun = True
                    cell.status = cell.error = ""
                    cell.round = line["round"]
                case "round":
                    cell.round = line["round"]
                    cell.seconds += line["seconds"]
                    cell.timed_rounds += 1
                case "evaluation" if line["split"] == (cell.split or line["split"]):
                    cell.evaluations[line["round"]] = number(line["value"]), number(line["loss"])
                case "client_evaluation":
                    cell.own = client_evaluation_of(line)
                case "warning":
                    cell.warnings.append(line["text"])
                case "end":
                    cell.status = line["status"]
                    cell.error = line.get("error") or ""
