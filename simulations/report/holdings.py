"""What clients hold: what they said on joining, or the partition that was drawn for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from simulations.report.losses import named_clients
from simulations.runs.folder import RunFolder
from simulations.runs.records import CellRecord, PartitionRecord
from simulations.runs.results import Holding

__all__ = ["ClientTable", "client_tables"]


@dataclass(frozen=True)
class ClientTable:
    """Images by client and label for one partition and seed.

    Attributes:
        record: the counts. reported: whether they are what the clients said on joining; else they
            are the partition that was drawn for them.
        silent: the clients that said nothing, of which the counts are 0.
    """

    record: PartitionRecord
    reported: bool
    silent: tuple[int, ...] = ()

    @property
    def silent_clients(self) -> str:
        """The silent clients in words."""
        return named_clients(self.silent)


def client_tables(run: RunFolder, partition: str, cells: Iterable[CellRecord]) -> list[ClientTable]:
    """Return what the clients of `partition` hold, by seed: what those of the result `cells` said.

    Where they said nothing of their labels it is the partition that was drawn, if the clients are
    simulated; what a fleet's devices hold nobody else knows.
    """
    drawn = (
        {}
        if run.grid.deployed
        else {t.seed: t for t in run.partitions() if t.partition == partition}
    )
    tables = {seed: ClientTable(table, reported=False) for seed, table in drawn.items()}
    for cell in cells:
        if any(held.labels is not None for held in cell.holdings.values()):
            seed = cell.config.seed
            table = drawn.get(seed)
            told = _reported(cell, partition, _classes(run, cell, table))
            if table:
                known = replace(told.record, notes=table.notes, names=table.names)
                told = replace(told, record=known)
            tables[seed] = told
    return [tables[seed] for seed in sorted(tables)]


def _reported(cell: CellRecord, partition: str, classes: Sequence[str]) -> ClientTable:
    clients = range(cell.config.partition.clients)
    rows = [_row(cell.holdings, client, len(classes)) for client in clients]
    return ClientTable(
        PartitionRecord(
            partition,
            cell.config.seed,
            list(classes),
            [row or [0] * len(classes) for row in rows],
        ),
        reported=True,
        silent=tuple(client for client, row in zip(clients, rows, strict=True) if row is None),
    )


def _row(holdings: Mapping[int, Holding], client: int, classes: int) -> list[int] | None:
    held = holdings.get(client)
    if held is None or held.labels is None:
        return None
    return [held.labels.get(label, 0) for label in range(classes)]


def _classes(run: RunFolder, cell: CellRecord, drawn: PartitionRecord | None) -> Sequence[str]:
    """The names of the classes: as recorded for the cell's data, or numbers."""
    if (data := run.data_of(cell.config.data)) is not None:
        return data.classes
    if drawn is not None:
        return drawn.classes
    labels = (held.labels or {} for held in cell.holdings.values())
    return [str(label) for label in range(1 + max(max(of, default=0) for of in labels))]
