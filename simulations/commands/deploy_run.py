"""``fedkn deploy run``: one experiment on the fleet's devices."""

# ruff: noqa: PLC0415 - torch and Flower take seconds to import, and --help does not need them

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError, UserError
from fedkn.tables import read_toml
from simulations.commands import options as o
from simulations.commands.options import given

if TYPE_CHECKING:
    from server.deployment.control import Control, RunState
    from server.deployment.fleet import Fleet
    from simulations.comparison.grid import GridConfig
    from simulations.runs.deployed_run import Progress
    from simulations.runs.folder import RunFolder

__all__ = ["follow", "missing_updates", "run", "stop"]

FleetFolder = Annotated[Path, typer.Argument(metavar="FLEET", help="The fleet folder.")]
RunName = Annotated[str, typer.Argument(metavar="NAME", help="The run: its folder in FLEET/runs.")]

# Devices that are asked for are mostly there; one that is not is named soon.
_WAIT_SECONDS = 30.0
_ENOUGH = 0.5


def run(
    fleet: FleetFolder,
    *,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="An experiment, as for fedkn run.")
    ] = None,
    settings: o.Settings = None,
    name: o.Name = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Go on with runs/NAME from its last checkpoint."),
    ] = None,
    debug: o.Debug = False,
) -> None:
    """Run one experiment on the devices, print every round, and write a report.

    Every device is one partition. Ctrl-C stops the run and keeps its checkpoints; should this
    command be lost, the run goes on: follow and stop are for that.

    Examples:

      fedkn deploy run fleet/ --set rounds=10 --set train.local_epochs=4

      fedkn deploy run fleet/ --config mine.toml --name trial
    """
    from server.deployment.control import Control, advice
    from server.deployment.fleet import Fleet
    from server.deployment.startup import wait_for_devices
    from simulations.api import beginning
    from simulations.runs.deployed_run import run_deployed, unfinished_run

    say = _sayer()
    opened = Fleet.open(fleet)
    if resume:
        if config or settings or name:
            raise UserError("--resume takes the run as it was begun: leave the other options out")
        grid, folder = beginning.begun(opened.runs / resume)
        beginning.refuse_other_data(grid, folder, say)
    else:
        grid = _grid(opened, read_toml(config) if config else {}, given(settings))
        folder = None
    with Control(opened) as control:
        wait_for_devices(control, _WAIT_SECONDS, say)
        if folder is None:
            grid, folder = _created(opened, grid, name)
        cell = _cell(grid, folder)
        if unfinished_run(control, folder.path):
            raise UserError(f"'{folder.path}' is being run: {advice(opened, folder.path)}")
        say(f"run folder: {folder.path}")
        _show(opened, folder, cell, lambda: run_deployed(opened, cell, control, say))


def follow(fleet: FleetFolder, name: RunName, *, debug: o.Debug = False) -> None:
    """Show a run that goes on, from its last start to its end, and write the report.

    Ctrl-C ends this command, not the run.
    """
    from server.deployment.control import Control
    from simulations.api import beginning
    from simulations.runs.deployed_run import follow_run

    say = _sayer()
    with Control(_opened(fleet)) as control:
        opened, folder, run = _going_on(fleet, name, control)
        cell = _cell(beginning.begun(folder.path)[0], folder)
        tail = folder.tail_of_last()
        _show(
            opened,
            folder,
            cell,
            lambda: follow_run(opened, cell, control, say, run_id=run.run_id, tail=tail),
            stops=False,
        )


def stop(fleet: FleetFolder, name: RunName, *, debug: o.Debug = False) -> None:
    """End a run that goes on; its checkpoints stay."""
    from server.deployment.control import Control
    from simulations.api import beginning

    with Control(_opened(fleet)) as control:
        _, folder, run = _going_on(fleet, name, control)
        control.stop(run.run_id)
    again = beginning.how_to_resume_deployed(folder.path, fleet)
    _sayer()(f"stopped; what was done is kept. Go on with: {again}")


def missing_updates(progress: Progress) -> str:
    """Return a line that names for every client the rounds without an update of it."""
    each = (
        f"client {client}: round{'s' * (len(rounds) > 1)} {_spans(rounds)}"
        for client, rounds in sorted(progress.missing.items())
    )
    return f"updates missing: {'; '.join(each)}"


def _opened(fleet: Path) -> Fleet:
    from server.deployment.fleet import Fleet

    return Fleet.open(fleet)


def _going_on(fleet: Path, name: str, control: Control) -> tuple[Fleet, RunFolder, RunState]:
    """Return the run `name` of a fleet, which goes on. Raises UserError if it does not."""
    from simulations.runs.deployed_run import unfinished_run
    from simulations.runs.folder import RunFolder

    opened = _opened(fleet)
    folder = RunFolder.open(opened.runs / name)
    run = unfinished_run(control, folder.path)
    if run is None:
        raise UserError(
            f"'{folder.path}' is not being run: its results are there, and "
            f"fedkn deploy run {fleet} --resume {name} goes on with one that was stopped"
        )
    return opened, folder, run


def _show(
    fleet: Fleet,
    folder: RunFolder,
    cell: ExperimentConfig,
    run: Callable[[], Progress],
    *,
    stops: bool = True,
) -> None:
    """Wait for the end of `run`, which Ctrl-C `stops` or not; show and report what came of it."""
    from simulations.api import beginning
    from simulations.report import build_report

    say = _sayer()
    again = beginning.how_to_resume_deployed(folder.path, fleet.path)
    try:
        progress = run()
    except KeyboardInterrupt:
        if stops:
            say(f"stopped; what was done is kept. Go on with: {again}")
        else:
            say(f"the run goes on: fedkn deploy follow {fleet.path} {folder.path.name}")
        raise typer.Exit(130) from None
    except FedknError as error:
        raise FedknError(f"{error}. Results so far: {folder.path}. Go on with: {again}") from None
    say(
        f"{progress.metric.name} {progress.value:.4f} after {cell.rounds} rounds, "
        f"{progress.seconds:.0f} s; weights {progress.weights_sha256[:16]}"
    )
    if progress.missing:
        say(missing_updates(progress))
    say(_training_time(progress, cell))
    say(f"Report:  {build_report(folder)}")


def _sayer() -> Callable[[str], None]:
    console = Console()

    def say(text: str) -> None:
        # Paths must stay whole, to be copied.
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    return say


def _grid(fleet: Fleet, table: Mapping[str, Any], flags: Mapping[str, Any]) -> GridConfig:
    """Return the grid of a single cell: the experiment, on as many partitions as devices."""
    from simulations.comparison.grid import GridConfig

    if "compare" in table or any(key.startswith("compare.axes.") for key in flags):
        raise UserError("a comparison runs in simulation: use fedkn compare, or drop [compare]")
    base = {
        "partition.clients": fleet.clients,
        "cohort": min(ExperimentConfig().cohort, fleet.clients),
    }
    grid = GridConfig.single(base, table, flags)
    if grid.partition.clients != fleet.clients:
        raise UserError(
            f"partition.clients = {grid.partition.clients}, but the fleet has {fleet.clients} "
            "devices, each of which is one partition: leave it out"
        )
    return grid


def _created(fleet: Fleet, grid: GridConfig, name: str | None) -> tuple[GridConfig, RunFolder]:
    from simulations.api import beginning
    from simulations.commands.launch import repeat_command

    chosen = name or f"run-{datetime.now():%Y%m%d-%H%M%S}"
    grid = grid.overlay(compare__name=chosen)
    return beginning.created(grid, "run", fleet.runs / chosen, repeat_command())


def _cell(grid: GridConfig, folder: RunFolder) -> ExperimentConfig:
    from simulations.comparison.grid import groups, result_cells

    (group,) = groups(grid)
    (cell,) = result_cells(grid, group, grid.train.learning_rate)
    return cell.config.overlay(checkpoint__folder=str(folder.path.resolve()))


def _spans(rounds: Iterable[int]) -> str:
    """Return ascending numbers as text: 1, 2, 3, 7 is ``1-3, 7``."""
    spans: list[list[int]] = []
    for number in rounds:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _training_time(progress: Progress, config: ExperimentConfig) -> str:
    share = progress.training_share
    text = (
        f"Devices trained for {progress.training:.1f} of {progress.seconds:.1f} s "
        f"({share:.0%} of the wall clock)"
    )
    if progress.waiting >= 1.0:
        who = ", ".join(map(str, sorted(progress.waited_for)))
        text += f"; for {progress.waiting:.1f} s nothing was waited for but client {who}, not there"
    overhead = max(0.0, progress.seconds - progress.training - progress.waiting)
    busy = progress.training + overhead
    if not progress.training or not progress.rounds or progress.training >= _ENOUGH * busy:
        return f"{text}."
    rest = overhead / progress.rounds
    factor = math.ceil(overhead / progress.training)
    key = "local_steps" if config.train.local_steps else "local_epochs"
    value = getattr(config.train, key) * factor
    return (
        f"{text}: training was NOT the larger part. The other {rest:.1f} s of a round pass "
        "however much is trained (docs/deployment.md), so do more local work in fewer rounds, as "
        f"far as accuracy allows: --set train.{key}={value} would make it half."
    )
