"""What cells that run at once print: whose line it is, and no colours in a file."""

from __future__ import annotations

import json
from pathlib import Path

import fedkn


def test_every_line_of_the_log_names_its_cell_and_has_no_colours(tmp_path: Path) -> None:
    """Also those of the processes that train a cell's clients."""
    result = fedkn.compare(
        normalizer=["group", "none"],
        batch_size=2,
        seeds=1,
        learning_rate=0.1,
        rounds=2,
        clients=3,
        cohort=2,
        workers=2,
        train={"local_steps": 2},
        model={"width": 4},
        settings={
            "data.test_limit": 40,
            "observers.names": "tests.server.observers.watchers:FailsLate",
        },
        out=tmp_path / "run",
        progress=False,
    )
    assert result.failed == 0
    log = (result.folder / "log.txt").read_text()
    assert "\x1b" not in log
    cells = list(result.cells.cell)
    assert len(cells) == 2
    told = [line for line in log.splitlines() if "round" in line]
    for cell in cells:
        assert sum(f"{cell}: round 2/2" in line for line in told) == 1
        # The observer failed in a process of its own, and its warning got through.
        assert sum(cell in line and "the disk of" in line for line in told) == 1
    assert all(sum(cell in line for cell in cells) == 1 for line in told)
    lines = map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines())
    assert sorted(line["cell"] for line in lines if line["kind"] == "warning") == sorted(cells)


def test_the_warning_of_an_observer_reaches_whoever_watches(tmp_path: Path, capfd) -> None:
    result = fedkn.run(
        normalizer="none",
        rounds=1,
        clients=3,
        cohort=2,
        train={"local_steps": 2},
        model={"width": 4},
        observers="tests.server.observers.watchers:FailsLate",
        out=tmp_path / "run",
        progress=False,
    )
    said = capfd.readouterr().err
    assert "\x1b" not in said
    assert " ".join(said.split()).count("failed in round_ends") == 1
    (record,) = result._run.cells()
    (warning,) = record.warnings
    assert "told nothing more" in warning
