"""What the commands that run cells have in common: check, run, report, and say what came of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click
import typer
from rich.console import Console
from rich.text import Text

from fedkn.errors import FedknError, UserError
from fedkn.experiment import data_summary
from fedkn.files import expanded
from fedkn.network import pinned_weights
from server.metrics_log import LogNotWritten
from server.run_data import hold_to_data
from simulations.comparison.grid import GridConfig, partitions, seeds
from simulations.comparison.preflight import check
from simulations.comparison.progress import RoundLines, shown_progress
from simulations.comparison.scheduler import Totals, run_grid
from simulations.report import build_report, summary_dict, summary_table
from simulations.runs.environment import describe_environment
from simulations.runs.folder import RunFolder, write_json
from simulations.runs.records import DEPLOYED, GridRecord, partition_label
from simulations.terminal import terminal

__all__ = [
    "begun",
    "carry_on",
    "created",
    "execute",
    "how_to_resume_deployed",
    "refuse_other_data",
    "repeat_command",
]

_GRID_FILE = "grid.json"
_RUNS = Path("runs")


def created(grid: GridConfig, command: str, out: Path | None) -> tuple[GridConfig, RunFolder]:
    """Check `grid`, then make its run folder: `out`, or runs/ and its name or the time.

    Raises UserError, having written nothing, for anything that would make the run fail.
    """
    if grid.evaluation.split != "test":
        raise UserError(
            f"evaluation.split = {grid.evaluation.split}: a run measures on test images, and "
            "searches on validation images, by itself: leave it out"
        )
    if grid.data.root:
        root = str(expanded(grid.data.root).resolve())
        grid = grid.overlay(data__root=root)
    if weights := pinned_weights(grid.model):
        grid = grid.resolve(grid.flat(), weights)
    name = grid.compare.name or f"{command}-{datetime.now():%Y%m%d-%H%M%S}"
    path = out or _RUNS / name
    if not RunFolder.may_begin(path):
        deployed = repeat_command().startswith(DEPLOYED)
        again = how_to_resume_deployed(path) if deployed else how_to_resume(path)
        raise UserError(f"'{path}' exists already: choose another --name, or '{again}'")
    tables = check(grid)
    data = data_summary(grid.experiment)
    record = _record(grid, path.name)
    with RunFolder.creating(path, record) as run:
        # Before there is anything that a resume could go on from.
        hold_to_data(path, grid.data, data)
        write_json(path / _GRID_FILE, grid.flat())
        if not record.deployed:
            # What a fleet's devices hold, they say themselves.
            run.write_partitions(tables)
        run.write_environment(describe_environment())
    return grid, run


def execute(grid: GridConfig, run: RunFolder, *, as_json: bool, each_round: bool = False) -> None:
    """Run what is left of `grid`, write the report and show the result.

    Raises typer.Exit with 1 if a result cell failed, 130 if the run was stopped.
    """
    console, again = terminal(stderr=True), how_to_resume(run.path)
    try:
        if each_round and not as_json:
            totals = run_grid(grid, run, RoundLines(console))
        else:
            with shown_progress(console, quiet=as_json) as watcher:
                totals = run_grid(grid, run, watcher)
    except KeyboardInterrupt:
        _say(console, f"stopped; what was done is kept. Go on with: {again}")
        raise typer.Exit(130) from None
    except LogNotWritten as error:
        raise FedknError(f"{error}. What was done is kept. Go on with: {again}") from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise FedknError(
            f"{error.strerror or error}{where}. What was done is kept: mend that, and go on with: "
            f"{again}"
        ) from error
    _conclude(run, totals, as_json=as_json)
    if totals.failed:
        _say(
            console,
            f"{totals.failed} of {totals.completed + totals.failed} result cells failed "
            f"(log: {run.path / 'log.txt'}). Try them again with: {again}",
        )
        raise typer.Exit(1)


def carry_on(path: Path, workers: int | None, *, as_json: bool) -> None:
    """Resume the run in the folder `path`; a run that is complete is only reported again."""
    grid, run = begun(path, {} if workers is None else {"compare.workers": workers})
    if run.grid.deployed:
        again = how_to_resume_deployed(path)
        raise UserError(f"'{path}' is trained by a fleet's devices: go on with '{again}'")
    refuse_other_data(grid, run)
    check(grid)
    execute(grid, run, as_json=as_json)


def begun(path: Path, changes: Mapping[str, object] | None = None) -> tuple[GridConfig, RunFolder]:
    """Return the grid, with `changes`, and the folder of the run that was begun in `path`.

    Raises UserError where there is none, or its grid cannot be read.
    """
    run = RunFolder.open(path)
    return GridConfig.resolve(run.read(_GRID_FILE), changes or {}), run


def refuse_other_data(grid: GridConfig, run: RunFolder) -> None:
    """Raise UserError if the data of the run `run` are not those that it was begun with.

    Where nothing was recorded to compare them with, it says so, on the terminal and in log.txt.
    """
    try:
        recorded = hold_to_data(run.path, grid.data, data_summary(grid.experiment))
        if not recorded:
            text = (
                f"'{run.path}' recorded nothing of the data that it was begun with: whether these "
                "are the same cannot be checked. From now on it can"
            )
            _say(Console(stderr=True), text)
            with (run.path / "log.txt").open("a", encoding="utf-8") as log:
                log.write(f"{text}\n")
    except OSError as error:
        raise UserError(f"cannot write in '{run.path}': {error.strerror or error}") from None


def how_to_resume(path: Path) -> str:
    """Return the command line that goes on with the run in `path`."""
    return f"fedkn resume {shlex.quote(str(path))}"


def how_to_resume_deployed(path: Path, fleet: Path | None = None) -> str:
    """Return the command line that goes on with the run in `path` on its fleet's devices.

    `fleet` is the fleet's folder as the user gave it: a run lies in its runs/.
    """
    return f"{DEPLOYED} {shlex.quote(str(fleet or path.parent.parent))} --resume {path.name}"


def repeat_command() -> str:
    """Return the command line of this invocation."""
    arguments = click.get_current_context().find_root().obj
    return shlex.join(["fedkn", *arguments])


def _record(grid: GridConfig, name: str) -> GridRecord:
    compare = grid.compare
    searched = len(compare.learning_rates) > 1
    return GridRecord(
        name=name,
        command=repeat_command(),
        normalizers=list(compare.normalizers),
        batch_sizes=list(compare.batch_sizes),
        partitions=[partition_label(partition) for partition in partitions(grid)],
        seeds=list(seeds(grid, "result")),
        learning_rates=sorted(compare.learning_rates),
        search={
            "split": "validation",
            "seeds": list(seeds(grid, "search")),
            "rounds": compare.search_rounds or grid.rounds,
            "choice": "best mean accuracy of the last 3 evaluations, of the clients' own models "
            "where tensors stay on the clients; "
            "extended by up to 2 rates beyond either end while the best is there",
        }
        if searched
        else {},
        experiment=dict(grid.experiment.flat()),
    )


def _conclude(run: RunFolder, totals: Totals, *, as_json: bool) -> None:
    report = build_report(run)
    summary = summary_dict(run)
    if as_json:
        summary["report"] = str(report)
        summary["cells"] |= asdict(totals)
        sys.stdout.write(json.dumps(summary) + "\n")
        return
    console = terminal()
    for partition in summary["partitions"]:
        console.print(Text(partition["verdict"], style="bold"))
    console.print(summary_table(run))
    _say(console, f"Report:  {report}")
    _say(console, f"Again:   fedkn report {_quoted(run)}")


def _quoted(run: RunFolder) -> str:
    return shlex.quote(str(run.path))


def _say(console: Console, text: str) -> None:
    # Paths must stay whole, to be copied.
    console.print(text, soft_wrap=True)
