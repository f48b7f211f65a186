"""What a fleet takes on the server's disk, and what of the SuperLink's database can go.

Flower 1.41 drops a run's messages and arrays once it has ended. It keeps its rows, its log and its
copy of the code (0.8 MB) for ever, and a database that was large once stays so.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from server.deployment.fleet import Fleet

__all__ = ["KEPT_RUNS", "disk_use", "make_shrinkable", "prune"]

KEPT_RUNS = 50
"""Finished runs that the SuperLink goes on knowing; the run folders of all of them stay."""

_LOG = logging.getLogger("flwr")
_FULL = 1
_BUSY_SECONDS = 20.0


def make_shrinkable(database: Path) -> None:
    """Let an SQLite `database`, which may not exist yet, give back the pages that it empties.

    Nobody else may have it open: that of a fleet which began without it is written anew.
    """
    with _opened(database) as connection:
        if connection.execute("PRAGMA auto_vacuum").fetchone() != (_FULL,):
            connection.execute(f"PRAGMA auto_vacuum = {_FULL}")
            connection.execute("VACUUM")
    database.chmod(stat.S_IRUSR | stat.S_IWUSR)


def prune(database: Path, kept: int = KEPT_RUNS) -> int:
    """Remove from a SuperLink's database all finished runs but the last `kept`; return how many.

    It may be in use. What waits in its log of writes is put into it, and that log emptied.
    """
    try:
        with _opened(database) as connection:
            removed = _without_old_runs(connection, kept)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        # In use for long, or not made yet: the next time will do.
        _LOG.debug("the SuperLink's database was not pruned: %s", error)
        return 0
    if removed:
        _LOG.info("the last %d finished runs are kept, %d older ones removed", kept, removed)
    return removed


def disk_use(fleet: Fleet) -> list[tuple[str, int]]:
    """Return what lies in the fleet folder, by name, with its size in bytes."""
    database = sum(_size(path) for path in fleet.database.parent.glob(fleet.database.name + "*"))
    folders = ("runs", "logs", "homes")
    return [("SuperLink's database", database)] + [(f, _size(fleet.path / f)) for f in folders]


def _without_old_runs(connection: sqlite3.Connection, kept: int) -> int:
    tables = [
        name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
    ]
    columns = {
        table: {row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')}
        for table in tables
    }
    if not {"run", "task", "series_runs", "fab"} <= columns.keys():
        return 0
    connection.execute("BEGIN IMMEDIATE")
    with connection:
        connection.execute(
            "CREATE TEMP TABLE old AS SELECT run.run_id, run.series_id FROM run JOIN task ON "
            "task.task_id = run.primary_task_id WHERE task.finished_at IS NOT NULL "
            "ORDER BY task.finished_at DESC LIMIT -1 OFFSET ?",
            (kept,),
        )
        (count,) = connection.execute("SELECT count(*) FROM old").fetchone()
        if count:
            _delete_runs(connection, columns)
    connection.execute("DROP TABLE old")
    return int(count)


def _delete_runs(connection: sqlite3.Connection, columns: dict[str, set[str]]) -> None:
    # Rows of tasks go before the tasks, those of runs before the runs, as foreign keys have it.
    of_tasks = "task_id IN (SELECT task_id FROM task WHERE run_id IN (SELECT run_id FROM old))"
    for table in sorted(columns, key=lambda name: (name in ("task", "run"), name == "run")):
        if "run_id" in columns[table]:
            connection.execute(f'DELETE FROM "{table}" WHERE run_id IN (SELECT run_id FROM old)')
        elif "task_id" in columns[table]:
            connection.execute(f'DELETE FROM "{table}" WHERE {of_tasks}')
    orphaned = (
        "series_id IN (SELECT series_id FROM old) AND series_id NOT IN (SELECT series_id FROM run)"
    )
    for table, names in columns.items():
        if "series_id" in names and table != "run":
            connection.execute(f'DELETE FROM "{table}" WHERE {orphaned}')
    used = "SELECT fab_hash FROM run UNION SELECT fab_hash FROM task WHERE fab_hash IS NOT NULL"
    connection.execute(f"DELETE FROM fab WHERE fab_hash NOT IN ({used})")
    if "federation_app" in columns:
        connection.execute(
            "DELETE FROM federation_app WHERE fab_hash NOT IN (SELECT fab_hash FROM fab)"
        )


@contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(database, timeout=_BUSY_SECONDS, isolation_level=None)
    with closing(connection):
        yield connection


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; links are not followed."""
    found = 0
    for entry in [path] if not path.is_dir() else _below(path):
        try:
            status = entry.lstat()
        except OSError:
            continue
        found += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return found


def _below(folder: Path) -> Iterator[Path]:
    for base, _, names in os.walk(folder):
        yield from (Path(base) / name for name in names)
