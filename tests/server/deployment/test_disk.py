"""What of the SuperLink's database goes, with Flower's own tables; what a fleet takes on disk."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab
from flwr.superlink.config_loader import get_objectstore_linkstate_factories
from flwr.superlink.main import get_federation_manager

from server.deployment.creation import create_fleet
from server.deployment.disk import disk_use, make_shrinkable, prune

MIB = 2**20


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def link_state(database: Path) -> LinkState:
    """Return Flower's own state, as the SuperLink opens it."""
    make_shrinkable(database)
    manager = get_federation_manager(is_simulation=False)
    return get_objectstore_linkstate_factories(str(database), manager)[1].state()


def a_run(state: LinkState, number: int, *, finished: bool = True) -> int:
    """Add a run with code of its own, a megabyte of it, and return its id."""
    fab = state.store_fab(Fab("", bytes([number]) * MIB, {}))
    run_id = state.create_run(
        "fedkn/fedkn",
        "1",
        fab,
        {},
        NOOP_FEDERATION_ID,
        None,
        "me",
        primary_task_type=TaskType.SERVER_APP,
    )
    if finished:
        assert state.stop_run(run_id)
    return run_id


def rows(database: Path) -> dict[str, int]:
    """Return the number of rows of every table that has any."""
    connection = sqlite3.connect(database)
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    counts = {
        name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]
        for (name,) in names
    }
    connection.close()
    return {name: count for name, count in counts.items() if count}


def taken(database: Path) -> int:
    return sum(path.stat().st_size for path in database.parent.glob("state.db*"))


def test_old_runs_go_with_all_that_is_theirs_and_the_disk_gets_its_room_back(database):
    state = link_state(database)
    first = a_run(state, 0)
    prune(database)
    one = rows(database)
    runs = [first, *(a_run(state, number) for number in range(1, 12))]
    going = a_run(state, 12, finished=False)
    full = taken(database)
    assert full > 13 * MIB
    assert prune(database, kept=2) == 10
    left = {run.run_id for run in state.get_run_info()}
    assert left == {*runs[-2:], going}
    for table in ("run", "task", "fab", "run_series", "series_runs", "series_context"):
        assert rows(database).get(table, 0) == 3 * one.get(table, 0), table
    assert taken(database) < full - 9 * MIB
    # What is left works.
    assert state.get_fab(state.get_run_info(run_ids=[going])[0].fab_hash)
    a_run(state, 13)
    assert prune(database, kept=2) == 1


def test_a_run_that_goes_on_is_never_old(database):
    state = link_state(database)
    going = a_run(state, 0, finished=False)
    a_run(state, 1)
    assert prune(database, kept=0) == 1
    assert [run.run_id for run in state.get_run_info()] == [going]


def test_an_old_database_learns_to_shrink(database):
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE t (x BLOB)")
    connection.execute("INSERT INTO t VALUES (zeroblob(5000000))")
    connection.commit()
    connection.execute("DELETE FROM t")
    connection.commit()
    connection.close()
    before = database.stat().st_size
    assert before > 5_000_000
    make_shrinkable(database)
    assert database.stat().st_size < 50_000
    assert stat.S_IMODE(database.stat().st_mode) == 0o600


def test_what_is_no_superlinks_database_is_left_alone(database):
    assert prune(database) == 0
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE run (x)")
    connection.close()
    assert prune(database, kept=0) == 0
    database.write_bytes(b"no database at all" * 100)
    assert prune(database) == 0


def test_what_a_fleet_takes(tmp_path):
    fleet = create_fleet(tmp_path / "fleet", 1, "localhost", 18443)
    fleet.database.write_bytes(bytes(3000))
    (fleet.database.parent / "state.db-wal").write_bytes(bytes(500))
    (fleet.runs / "a" / "cells").mkdir(parents=True)
    (fleet.runs / "a" / "cells" / "x").write_bytes(bytes(70))
    (fleet.runs / "link").symlink_to("/usr")
    use = dict(disk_use(fleet))
    assert use["SuperLink's database"] == 3500
    assert use["runs"] == 70
    assert use["logs"] == 0
