"""Runs of fake cells. ``python -m tests.simulations.fake_runs RUN`` runs one in a process."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from simulations.comparison.grid import GridConfig
from simulations.comparison.scheduler import Board, Totals, run_grid
from simulations.runs.folder import RunFolder
from simulations.runs.records import GridRecord

__all__ = ["Recorder", "make_run", "run_cells"]

RUNNER = "tests.simulations.fake_cells:run_cell"


class Recorder:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.most_running = 0
        self.boards = 0

    def update(self, board: Board) -> None:
        self.boards += 1
        self.most_running = max(self.most_running, len(board.running))

    def notice(self, text: str) -> None:
        self.notices.append(text)


def make_run(path: Path, **settings: object) -> tuple[GridConfig, RunFolder]:
    """Return a small grid and its new run folder."""
    defaults = {"rounds": 3, "compare.normalizers": "kernel", "compare.batch_sizes": 2}
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    grid = GridConfig.resolve(defaults, {"compare.workers": 2}, changed)
    record = GridRecord("fake", "fedkn", [], [], [], [], [], {}, {})
    run = RunFolder.create(path, record)
    (path / "grid.json").write_text(json.dumps(grid.flat()))
    return grid, run


def run_cells(path: Path, watcher: Recorder | None = None, *, runner: str = RUNNER) -> Totals:
    """Run, or resume, the grid of `make_run`."""
    grid = GridConfig.resolve(json.loads((path / "grid.json").read_text()))
    return run_grid(grid, RunFolder.open(path), watcher or Recorder(), runner=runner)


if __name__ == "__main__":
    # A shell in the background starts its commands with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run_cells(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
