"""A run folder as its report takes it: cells by place, planned ones included."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple, TypeVar

from fedkn.algorithms import keeps_model
from fedkn.errors import UserError
from fedkn.tasks.metric import Metric
from simulations.report.entries import Entry, entry_of
from simulations.runs.axes import Point, point_of
from simulations.runs.folder import RunFolder
from simulations.runs.metric import judged_by
from simulations.runs.records import CellRecord, GridRecord

__all__ = ["ReadRun", "read_run", "union"]

T = TypeVar("T")


class ReadRun(NamedTuple):
    """A run as it is read, before anything is compared."""

    folder: RunFolder
    label: str
    grid: GridRecord
    cells: list[CellRecord]
    damaged_lines: int
    keepers: set[str]
    metric: Metric
    places: dict[tuple[str, Point], dict[tuple[str, int], Entry]]


def read_run(run: RunFolder, label: str) -> ReadRun:
    """Return the run as a report takes it, under `label`."""
    tail = run.tail()
    tail.poll()
    grid, cells = run.grid, run.cells()
    results = [cell for cell in cells if cell.purpose == "result"]
    metric = judged_by(cells)
    planned = list(product(*([(key, value) for value in of] for key, of in grid.axes.items())))
    places: dict[tuple[str, Point], list[CellRecord]] = {
        (partition, point): []
        for point in planned
        for partition in union(grid.partitions, [cell.partition for cell in results])
    }
    for cell in results:
        places.setdefault((cell.partition, point_of(cell.config, grid.axes)), []).append(cell)
    return ReadRun(
        folder=run,
        label=label,
        grid=grid,
        cells=cells,
        damaged_lines=tail.skipped,
        keepers={cell.config.normalizer.name for cell in cells if _lacks_tensors(cell)},
        metric=metric,
        places={place: _entries(grid, of_place, metric) for place, of_place in places.items()},
    )


def union(*lists: Iterable[T]) -> list[T]:
    """The entries of all lists, each once, in the order of their first appearance."""
    return list(dict.fromkeys(entry for entries in lists for entry in entries))


def _entries(
    grid: GridRecord, cells: list[CellRecord], metric: Metric
) -> dict[tuple[str, int], Entry]:
    """The entries of one place, planned ones without a cell included."""
    normalizers = union(grid.normalizers, [cell.config.normalizer.name for cell in cells])
    sizes = sorted(union(grid.batch_sizes, [cell.config.train.batch_size for cell in cells]))
    by_entry: dict[tuple[str, int], list[CellRecord]] = {}
    for cell in cells:
        key = (cell.config.normalizer.name, cell.config.train.batch_size)
        by_entry.setdefault(key, []).append(cell)
    return {
        (name, size): entry_of(name, size, len(grid.seeds), by_entry.get((name, size), []), metric)
        for name in normalizers
        for size in sizes
    }


def _lacks_tensors(cell: CellRecord) -> bool:
    """Whether clients keep tensors that the global model has as initialised.

    Not where they keep whole models beside a global one that is as good as any.
    """
    try:
        return bool(cell.local_tensors) and not keeps_model(cell.config)
    except UserError:  # a strategy of somebody's own that is not here
        return bool(cell.local_tensors)
