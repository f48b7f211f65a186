"""Where a run begins, or goes on: its settings checked, its folder made, or opened."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from fedkn.errors import UserError
from fedkn.experiment import data_summary
from fedkn.files import expanded
from fedkn.locks import held
from fedkn.network import pinned_weights
from server.run_data import hold_to_data, move_data
from simulations.comparison.grid import GridConfig, experiments, partitions, seeds
from simulations.comparison.preflight import check
from simulations.runs.axes import value_text
from simulations.runs.environment import describe_environment
from simulations.runs.folder import RunFolder, write_json
from simulations.runs.records import DEPLOYED, GridRecord, partition_label

__all__ = [
    "amended",
    "begun",
    "created",
    "how_to_resume",
    "how_to_resume_deployed",
    "refuse_other_data",
]

_GRID_FILE = "grid.json"
_RUNS = Path("runs")


def created(
    grid: GridConfig, kind: str, out: Path | None, command: str
) -> tuple[GridConfig, RunFolder]:
    """Check `grid`, then make its run folder: `out`, or runs/ and its name, or `kind` and the time.

    `command` is what the folder records as what repeats the run.

    Raises UserError, having written nothing, for anything that would make the run fail.
    """
    if grid.evaluation.split != "test":
        raise UserError(
            f"evaluation.split = {grid.evaluation.split}: a run measures on test images, and "
            "searches on validation images, by itself: leave it out"
        )
    grid = _with_whole_paths(grid)
    grid = grid.resolve(grid.flat(), _pins(grid))
    name = grid.compare.name or f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    path = out or _RUNS / name
    if not RunFolder.may_begin(path):
        deployed = command.startswith(DEPLOYED)
        again = how_to_resume_deployed(path) if deployed else how_to_resume(path)
        raise UserError(f"'{path}' exists already: choose another --name, or '{again}'")
    tables = check(grid)
    data = [(point.data, data_summary(point)) for point in experiments(grid).values()]
    record = _record(grid, path.name, command)
    with RunFolder.creating(path, record) as run:
        # Before there is anything that a resume could go on from.
        for config, summary in data:
            hold_to_data(path, config, summary)
        write_json(path / _GRID_FILE, grid.flat())
        if not record.deployed:
            # What a fleet's devices hold, they say themselves.
            run.write_partitions(tables)
        run.write_environment(describe_environment())
    return grid, run


def begun(path: Path, changes: Mapping[str, object] | None = None) -> tuple[GridConfig, RunFolder]:
    """Return the grid, with `changes`, and the folder of the run that was begun in `path`.

    Raises UserError where there is none, or its grid cannot be read.
    """
    run = RunFolder.open(path)
    return GridConfig.resolve(run.read(_GRID_FILE), changes or {}), run


def amended(
    grid: GridConfig,
    run: RunFolder,
    *,
    root: Path | None,
    seeds: int | None,
    more: Mapping[str, object],
) -> GridConfig:
    """Return the grid of `run` with its data elsewhere, more seeds or `more` values, and record it.

    `more` has, of compare.normalizers and compare.batch_sizes, what comes to those that there are.

    Raises:
        UserError: the data at `root` are not those that it was begun with, fewer seeds than it has,
            data.root is varied, another process runs it: nothing was changed. Or the disk.
    """
    changes: dict[str, object] = {}
    if root is not None:
        if "data.root" in grid.compare.axes:
            raise UserError(
                f"'{run.path}' varies data.root: put the data back where they were, and leave out "
                "--root"
            )
        changes["data.root"] = str(expanded(str(root)).resolve())
    if seeds is not None:
        if seeds < grid.compare.seeds:
            raise UserError(
                f"'{run.path}' has {grid.compare.seeds} seeds already: give as many or more"
            )
        changes["compare.seeds"] = seeds
    added = GridConfig.resolve(grid.flat(), more).compare
    for key in more:
        name = key.removeprefix("compare.")
        there = [*getattr(grid.compare, name), *getattr(added, name)]
        changes[key] = list(dict.fromkeys(there))
    new = GridConfig.resolve(grid.flat(), changes)
    if new == grid:
        return grid
    tables = check(new)
    record = _record(new, run.grid.name, _then(run, new))
    try:
        with held(run.path):
            if root is not None:
                found = [(point.data, data_summary(point)) for point in experiments(new).values()]
                move_data(run.path, str(new.data.root), found)
            run.write_partitions(tables)
            run.write_grid(record)
            # Last: until it is there, the run is as it was.
            write_json(run.path / _GRID_FILE, new.flat())
    except OSError as error:
        raise UserError(f"cannot write in '{run.path}': {error.strerror or error}") from None
    return new


def refuse_other_data(grid: GridConfig, run: RunFolder, say: Callable[[str], None]) -> None:
    """Raise UserError if the data of the run `run` are not those that it was begun with.

    Where nothing was recorded to compare them with, it says so, by `say` and in log.txt.
    """
    try:
        recorded = [
            hold_to_data(run.path, point.data, data_summary(point))
            for point in experiments(grid).values()
        ]
        if not recorded[0]:
            text = (
                f"'{run.path}' recorded nothing of the data that it was begun with: whether these "
                "are the same cannot be checked. From now on it can"
            )
            say(text)
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


def _with_whole_paths(grid: GridConfig) -> GridConfig:
    """Return `grid` with paths of data that mean the same wherever it is resumed."""

    def whole(root: object) -> str:
        return str(expanded(str(root)).resolve()) if root else ""

    changes: dict[str, object] = {"data.root": whole(grid.data.root)}
    if roots := grid.compare.axes.get("data.root"):
        changes["compare.axes.data.root"] = [whole(root) for root in roots]
    return GridConfig.resolve(grid.flat(), changes)


def _pins(grid: GridConfig) -> dict[str, object]:
    """Return what holds `grid` to the bytes of the files of weights that it begins with.

    Raises UserError for one that cannot be read, or has another hash than was given.
    """
    files = grid.compare.axes.get("model.weights")
    if files is None:
        return dict(pinned_weights(grid.model))
    pins = [pinned_weights(grid.model.model_copy(update={"weights": file})) for file in files]
    return {
        "compare.axes.model.weights": [pin.get("model.weights", "") for pin in pins],
        "compare.weights_sha256": [pin.get("model.weights_sha256", "") for pin in pins],
    }


def _then(run: RunFolder, new: GridConfig) -> str:
    """The command that repeats the run, and then that by which it became `new`."""
    there, compare = run.grid, new.compare
    flags = {
        "--normalizer": [n for n in compare.normalizers if n not in there.normalizers],
        "--batch-size": [str(n) for n in compare.batch_sizes if n not in there.batch_sizes],
        "--seeds": [str(compare.seeds)] if compare.seeds > len(there.seeds) else [],
    }
    given = [f"{flag} {shlex.quote(','.join(values))}" for flag, values in flags.items() if values]
    return (
        " ".join([f"{there.command} && {how_to_resume(run.path)}", *given])
        if given
        else there.command
    )


def _record(grid: GridConfig, name: str, command: str) -> GridRecord:
    compare = grid.compare
    searched = len(compare.learning_rates) > 1
    return GridRecord(
        name=name,
        command=command,
        normalizers=list(compare.normalizers),
        batch_sizes=list(compare.batch_sizes),
        partitions=[partition_label(partition) for partition in partitions(grid)],
        seeds=list(seeds(grid, "result")),
        learning_rates=sorted(compare.learning_rates),
        search={
            "split": "validation",
            "seeds": list(seeds(grid, "search")),
            "rounds": compare.search_rounds or grid.rounds,
            "choice": "best mean value of the last 3 evaluations, of the clients' own models "
            "where tensors stay on the clients; "
            "extended by up to 2 rates beyond either end while the best is there",
        }
        if searched
        else {},
        experiment=dict(grid.experiment.flat()),
        axes={key: [value_text(v) for v in values] for key, values in compare.axes.items()},
    )
