"""A folder of run folders, sorted: rows of published tables, and comparisons of their own.

A row is known by its folder's name, as `fedkn reproduce` gives it, and is held to the table's
settings: figures of a run with others are never put beside the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedkn.errors import UserError
from simulations.reproduction import published
from simulations.reproduction.published import SCALES, PublishedTable
from simulations.reproduction.rows import folder_of, hold_to_row
from simulations.runs.flower_runs import open_run
from simulations.runs.folder import RunFolder

__all__ = ["Collection", "LeftOut", "TableRuns", "collect", "is_collection"]


@dataclass(frozen=True)
class TableRuns:
    """A published table at one scale, and the run folders of its rows, by the rows' names."""

    table: PublishedTable
    scale: str
    rows: Mapping[str, RunFolder]
    out: Path


@dataclass(frozen=True)
class LeftOut:
    """A folder that looks like a run's and is not on the page, and why."""

    path: Path
    why: str


@dataclass(frozen=True)
class Collection:
    """What a folder of run folders holds."""

    path: Path
    tables: list[TableRuns] = field(default_factory=list)
    studies: list[RunFolder] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def is_collection(path: Path) -> bool:
    """Whether `path` is no run folder itself, but holds some."""
    try:
        return path.is_dir() and not _is_run(path) and any(map(_is_run, path.iterdir()))
    except OSError:
        return False


def collect(path: Path, tables: Sequence[PublishedTable] | None = None) -> Collection:
    """Read a folder of run folders, in the order of the tables' names and of the folders'.

    `tables` are those that rows may be of, by default all of fedkn's.

    Raises UserError where `path` cannot be read, or holds no run folder.
    """
    if tables is None:
        tables = [published.table(name) for name in published.names()]
    try:
        folders = sorted(child for child in path.iterdir() if _is_run(child))
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from None
    if not folders:
        raise UserError(f"'{path}' holds no run folders: name one that does, or a run folder")
    named = {
        folder_of(of.name, scale, row.name, path).name: (of, scale, row)
        for of in tables
        for scale in SCALES
        for row in of.rows
    }
    found = Collection(path)
    rows: dict[tuple[str, str], dict[str, RunFolder]] = {}
    for folder in folders:
        try:
            run = open_run(folder)
            # Damaged lines are passed over; a configuration that nobody can read is not.
            run.cells()
            if folder.name not in named:
                found.studies.append(run)
                continue
            of, scale, row = named[folder.name]
            hold_to_row(of, scale, row, folder)
        except UserError as error:
            found.left_out.append(LeftOut(folder, str(error)))
            continue
        rows.setdefault((of.name, scale), {})[row.name] = run
    found.tables.extend(
        TableRuns(of, scale, rows[of.name, scale], path)
        for of in tables
        for scale in SCALES
        if (of.name, scale) in rows
    )
    return found


def _is_run(path: Path) -> bool:
    return (path / "experiment.json").is_file() or (path / "metrics.jsonl").is_file()
