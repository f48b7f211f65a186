"""A run digested: what every table and figure of the report shows, computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedkn.algorithms import keeps_model
from fedkn.errors import UserError
from simulations.report.entries import Entry, entry_of
from simulations.report.holdings import ClientTable, client_tables
from simulations.report.trials import Trial, trials_of
from simulations.report.verdict import Contest, verdicts
from simulations.runs.folder import RunFolder
from simulations.runs.records import CellRecord, GridRecord
from simulations.runs.statistics import Comparison, Group, compare_all_pairs

__all__ = ["RunSummary", "Section", "summarize"]

T = TypeVar("T")


@dataclass(frozen=True)
class Section:
    """One partition of a run: the normalizers by batch size on the same clients.

    `contests` are those of the global model on the test images, without `keepers`: the normalizers
    that keep tensors on the clients, whose global model is no client's. `own_contests` are those of
    the clients' own models, of all normalizers; empty where no own model was evaluated.
    """

    partition: str
    normalizers: list[str]
    batch_sizes: list[int]
    target: float
    entries: dict[tuple[str, int], Entry]
    keepers: list[str]
    contests: list[Contest]
    own_contests: list[Contest]
    trials: dict[tuple[str, int], list[Trial]]
    tables: list[ClientTable]

    @property
    def verdicts(self) -> list[str]:
        """The verdict, sentence by sentence."""
        ended = all(entry.ended >= entry.planned for entry in self.entries.values())
        return verdicts(self.contests, self.own_contests, self.keepers, so_far=not ended)

    @property
    def verdict(self) -> str:
        """The verdict."""
        return " ".join(self.verdicts)

    def ranked(self, batch_size: int) -> list[Entry]:
        """Return the entries of a batch size, best global mean first.

        Then come those of `keepers`, and those without a result last.
        """
        entries = [self.entries[name, batch_size] for name in self.normalizers]

        def place(entry: Entry) -> tuple[bool, bool, float]:
            mean = entry.accuracy.mean if entry.final else 0.0
            return not entry.final, entry.normalizer in self.keepers, -mean

        return sorted(entries, key=place)


@dataclass(frozen=True)
class RunSummary:
    """One run folder, digested. `label` tells it from the others of the same report."""

    folder: RunFolder
    label: str
    grid: GridRecord
    cells: list[CellRecord]
    damaged_lines: int
    planned: int
    sections: list[Section]
    comparisons: list[Comparison]
    own_comparisons: list[Comparison]

    @property
    def results(self) -> list[CellRecord]:
        """The cells that measure, without those of the learning-rate search."""
        return [cell for cell in self.cells if cell.purpose == "result"]

    @property
    def ended(self) -> int:
        """Result cells that have ended, in whatever way."""
        return sum(cell.status != "unfinished" for cell in self.results)

    @property
    def partial(self) -> str:
        """What is still missing, in words; empty for a run that is complete."""
        missing = self.planned - self.ended
        if missing <= 0:
            return ""
        under_way = sum(cell.status == "unfinished" for cell in self.results)
        text = f"Partial: {self.ended} of {self.planned} result cells have ended"
        if under_way:
            text += f", {under_way} started without ending"
        return f"{text}. Numbers below are those of the cells that have ended."


def summarize(runs: Sequence[RunFolder]) -> list[RunSummary]:
    """Digest run folders for one report. Raises UserError if none is given, or one twice."""
    if not runs:
        raise UserError("no run given: name at least one run folder")
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise UserError("the same run folder is given twice")
    names = [run.grid.name for run in runs]
    return [
        _summary(run, name if names.count(name) == 1 else f"{name} ({run.path})")
        for run, name in zip(runs, names, strict=True)
    ]


def _summary(run: RunFolder, label: str) -> RunSummary:
    tail = run.tail()
    tail.poll()
    grid, cells = run.grid, run.cells()
    results = [cell for cell in cells if cell.purpose == "result"]
    partitions = _union(grid.partitions, [cell.partition for cell in results])
    entries = {
        partition: _entries(grid, [cell for cell in results if cell.partition == partition])
        for partition in partitions
    }
    keepers = {cell.config.normalizer.name for cell in cells if _lacks_tensors(cell)}
    comparisons = _comparisons(
        entries, lambda entry: {} if entry.normalizer in keepers else entry.final
    )
    # Another question, hence another family: corrected by itself.
    own = _comparisons(entries, lambda entry: entry.own.final if entry.own else {})
    return RunSummary(
        folder=run,
        label=label,
        grid=grid,
        cells=cells,
        damaged_lines=tail.skipped,
        planned=max(
            len(results), sum(e.planned for section in entries.values() for e in section.values())
        ),
        sections=[
            _section(
                run,
                partition,
                of_partition,
                cells,
                keepers=keepers,
                comparisons=(comparisons, own),
            )
            for partition, of_partition in entries.items()
        ],
        comparisons=comparisons,
        own_comparisons=own,
    )


def _comparisons(
    entries: Mapping[str, Mapping[tuple[str, int], Entry]],
    final: Callable[[Entry], Mapping[int, float]],
) -> list[Comparison]:
    """All pairs within each partition and batch size, on accuracy by seed as `final` gives it."""
    groups: dict[Group, dict[str, Mapping[int, float]]] = {}
    for partition, of_partition in entries.items():
        for (name, size), entry in of_partition.items():
            if by_seed := final(entry):
                groups.setdefault((partition, size), {})[name] = by_seed
    return compare_all_pairs(groups)


def _entries(grid: GridRecord, cells: list[CellRecord]) -> dict[tuple[str, int], Entry]:
    """The entries of one partition, planned ones without a cell included."""
    normalizers = _union(grid.normalizers, [cell.config.normalizer.name for cell in cells])
    sizes = sorted(_union(grid.batch_sizes, [cell.config.train.batch_size for cell in cells]))
    by_entry: dict[tuple[str, int], list[CellRecord]] = {}
    for cell in cells:
        key = (cell.config.normalizer.name, cell.config.train.batch_size)
        by_entry.setdefault(key, []).append(cell)
    return {
        (name, size): entry_of(name, size, len(grid.seeds), by_entry.get((name, size), []))
        for name in normalizers
        for size in sizes
    }


def _section(
    run: RunFolder,
    partition: str,
    entries: dict[tuple[str, int], Entry],
    cells: list[CellRecord],
    *,
    keepers: Collection[str],
    comparisons: tuple[list[Comparison], list[Comparison]],
) -> Section:
    sizes = _union([size for _, size in entries])
    names = _union([name for name, _ in entries])
    of_partition = [cell for cell in cells if cell.partition == partition]
    targets = [cell.target for cell in of_partition]
    by_size = {size: [e for (_, of), e in entries.items() if of == size] for size in sizes}
    of_global, of_own = (
        {size: [c for c in family if c.group == (partition, size)] for size in sizes}
        for family in comparisons
    )
    return Section(
        partition=partition,
        normalizers=names,
        batch_sizes=sizes,
        target=targets[0] if targets else math.nan,
        entries=entries,
        keepers=[name for name in names if name in keepers],
        contests=[_contest(size, by_size[size], keepers, of_global[size]) for size in sizes],
        own_contests=[_own_contest(size, by_size[size], of_own[size]) for size in sizes]
        if any(entry.own for entry in entries.values())
        else [],
        trials={
            key: trials
            for key, entry in entries.items()
            if (trials := trials_of(entry, of_partition))
        },
        tables=client_tables(run, partition, [c for c in of_partition if c.purpose == "result"]),
    )


def _contest(
    batch_size: int,
    entries: Sequence[Entry],
    keepers: Collection[str],
    comparisons: list[Comparison],
) -> Contest:
    entries = [entry for entry in entries if entry.normalizer not in keepers]
    return Contest(
        batch_size=batch_size,
        means={e.normalizer: e.accuracy.mean for e in entries if e.final},
        comparisons=comparisons,
        lost={e.normalizer: e.lost for e in entries if e.lost},
        untrained=[e.normalizer for e in entries if e.cells and e.lost == len(e.cells)],
    )


def _own_contest(
    batch_size: int, entries: Sequence[Entry], comparisons: list[Comparison]
) -> Contest:
    results = {e.normalizer: e.own for e in entries if e.own}
    lost = {e.normalizer: e.ended - (len(e.own.final) if e.own else 0) for e in entries}
    return Contest(
        batch_size=batch_size,
        means={name: own.accuracy.mean for name, own in results.items()},
        comparisons=comparisons,
        lost={name: cells for name, cells in lost.items() if cells},
        untrained=[e.normalizer for e in entries if e.cells and lost[e.normalizer] == len(e.cells)],
        failed_clients={name: own.failed for name, own in results.items() if own.failed},
    )


def _union(*lists: Iterable[T]) -> list[T]:
    """The entries of all lists, each once, in the order of their first appearance."""
    return list(dict.fromkeys(entry for entries in lists for entry in entries))


def _lacks_tensors(cell: CellRecord) -> bool:
    """Whether clients keep tensors that the global model has as initialised.

    Not where they keep whole models beside a global one that is as good as any.
    """
    try:
        return bool(cell.local_tensors) and not keeps_model(cell.config)
    except UserError:  # a strategy of somebody's own that is not here
        return bool(cell.local_tensors)
