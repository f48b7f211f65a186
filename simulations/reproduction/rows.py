"""A row of a published table as a run folder: begun, gone on with, or kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkn.errors import UserError
from simulations.api import running
from simulations.api.beginning import begun
from simulations.comparison.grid import GridConfig, cells_in
from simulations.comparison.plan import planned
from simulations.comparison.preflight import check
from simulations.reproduction.published import PublishedTable, Row, settings_of
from simulations.runs.folder import RunFolder

__all__ = ["Planned", "carry_out", "folder_of", "hold_to_row", "plan_row"]

# Of this machine, or of how it is run: what comes out is the same.
_OF_THE_MACHINE = {
    *("data.root", "data.download", "device", "engine", "workers"),
    *("compare.name", "compare.workers", "compare.seeds"),
}


@dataclass(frozen=True)
class Planned:
    """A row that is to be run: where, by which settings, and what is left of it.

    Attributes:
        seeds: how many it is to have; a folder that has more keeps them.
        changes: the settings of this machine.
        left: result cells that have not completed.
    """

    row: Row
    folder: Path
    settings: dict[str, Any]
    seeds: int
    changes: dict[str, Any]
    left: int

    @property
    def begun(self) -> bool:
        """Whether there is a run folder."""
        return _is_begun(self.folder)

    def core_seconds(self) -> float:
        """Return an estimate of what is left, on one core, timing a few steps here; 0 if nothing.

        Raises UserError for what would make its cells fail, such as data that are not there.
        """
        if not self.left:
            return 0.0
        grid = GridConfig.resolve(self.settings)
        plan = planned(grid, check(grid))
        return plan.seconds * plan.workers * self.left / cells_in(grid)


def folder_of(table: str, scale: str, row: str, out: Path) -> Path:
    """Return the run folder of a row."""
    return out / f"{table}-{scale}-{row}"


def hold_to_row(of: PublishedTable, scale: str, row: Row, folder: Path) -> None:
    """Raise UserError unless the run in `folder` has the row's settings, those of a machine aside.

    The images may come from another source: that is told beside the figures.
    """
    grid, _ = begun(folder)
    changes = {"data.source": grid.data.source}
    settings = settings_of(of, scale, row, seeds=grid.compare.seeds, changes=changes)
    _refuse_others(grid, GridConfig.resolve(settings), folder)


def plan_row(
    of: PublishedTable, scale: str, row: Row, out: Path, *, seeds: int, changes: dict[str, Any]
) -> Planned:
    """Return what is to be done for a row.

    Raises:
        UserError: a setting is wrong, or the row's folder was begun with others than these.
    """
    settings = settings_of(of, scale, row, seeds=seeds, changes=changes)
    folder, left = folder_of(of.name, scale, row.name, out), seeds
    if _is_begun(folder):
        grid, run = begun(folder)
        _refuse_others(grid, GridConfig.resolve(settings), folder)
        settings["data.root"] = settings["data.root"] or grid.data.root
        seeds = max(seeds, grid.compare.seeds)
        done = [c for c in run.cells() if c.purpose == "result" and c.status == "completed"]
        left = seeds - len(done)
    return Planned(row, folder, settings, seeds, changes, left)


def carry_out(
    plan: Planned, *, workers: int | None, progress: running.Progress, command: str
) -> None:
    """Run what is left of a row, by `fedkn.compare` or `fedkn.resume`; what is done is kept.

    Raises:
        UserError: its settings cannot work, or its data are others than it was begun with.
        KeyboardInterrupt: it was stopped; the same command goes on.
    """
    if not plan.left:
        return
    if plan.begun:
        running.resume(
            plan.folder,
            root=plan.changes.get("data.root"),
            seeds=plan.seeds,
            workers=workers,
            progress=progress,
        )
        return
    running.compare(
        plan.settings,
        out=plan.folder,
        settings={} if workers is None else {"compare.workers": workers},
        progress=progress,
        command=command,
    )


def _is_begun(folder: Path) -> bool:
    return not RunFolder.may_begin(folder)


def _refuse_others(there: GridConfig, here: GridConfig, folder: Path) -> None:
    before, now = there.flat(), here.flat()
    # An experiment's own keys first: those of a comparison only repeat them.
    for key in sorted(before.keys() | now.keys(), key=lambda key: ("compare." in key, key)):
        if key not in _OF_THE_MACHINE and before.get(key) != now.get(key):
            how = {"data.source": f" (give --source {before.get(key)})"}.get(key, "")
            raise UserError(
                f"'{folder}' was begun with {key} = {before.get(key)}, and here it is "
                f"{now.get(key)}: its figures would not belong together. Go on with the settings "
                f"that it was begun with{how}, or give another --out"
            )
