"""Run experiments and comparisons, in whatever is at hand: a script, a notebook, a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from fedkn.errors import FedknError, UserError
from server.metrics_log import LogNotWritten
from simulations.api.beginning import (
    amended,
    begun,
    created,
    how_to_resume,
    how_to_resume_deployed,
    refuse_other_data,
)
from simulations.api.result import Result
from simulations.api.settings import COMPARE, RUN, File, keys_of, table_of
from simulations.comparison.grid import GridConfig, groups
from simulations.comparison.model_size import model_sentence
from simulations.comparison.plan import planned, told
from simulations.comparison.preflight import check
from simulations.comparison.progress import RoundLines, shown_progress
from simulations.comparison.scheduler import Board, Watcher, run_grid
from simulations.runs.folder import RunFolder
from simulations.terminal import terminal

__all__ = ["Progress", "compare", "resume", "run"]

Progress = bool | Callable[[Board], None]
"""How a run shows how far it is: True, live on a terminal and by lines elsewhere; False, by nothing
but what goes wrong; or a function, which is called a few times a second (see `Board`)."""


def run(
    file: File = None,
    /,
    *,
    out: str | PathLike[str] | None = None,
    progress: Progress = True,
    settings: Mapping[str, Any] | None = None,
    command: str = "",
    **short: Any,
) -> Result:
    """Run one experiment, as ``fedkn run`` does, and return what came of it.

    >>> result = fedkn.run(normalizer="kernel", batch_size=2, rounds=15)
    >>> result.rounds[["round", "value"]]
    >>> network = result.model()

    Args:
        file: a TOML file of settings, or a table (a dict) as such a file holds.
        out: the run folder; by default runs/ and ``name``, or the time.
        progress: True, False, or a function that is told how far it is.
        settings: keys of docs/configuration.md, dotted or nested: ``{"train.momentum": 0.9}``.
        command: what the run folder records as what repeats the run; by default this call.
        short: settings by the names of the command line's flags (normalizer, batch_size,
            learning_rate, partition, source, root, download, clients, cohort, rounds, model,
            strategy, seed, name), or whole tables (``train={"momentum": 0.9}``).

    A model, a source, a normalizer, a strategy may be a function or class of your own, if it stands
    in a .py file: cells run in processes of their own, which never run your script again.

    Raises:
        UserError: settings that cannot work; nothing was written.
        FedknError: the disk; what was done is kept, and `resume` goes on with it.

    An experiment that fails is a result, too: `Result.failed` and `Result.cells` say so.
    """
    grid = _single(table_of(file), keys_of(short, RUN), keys_of(settings or {}, {}))
    command = command or _call("run", file, out, settings, short)
    grid, folder = created(grid, "run", _path(out), command)
    if progress is True:
        _say([model_sentence(grid)])
    return _carried_out(grid, folder, progress, each_round=True)


def compare(
    file: File = None,
    /,
    *,
    out: str | PathLike[str] | None = None,
    progress: Progress = True,
    settings: Mapping[str, Any] | None = None,
    command: str = "",
    **short: Any,
) -> Result:
    """Compare normalizers x batch sizes x partitions x seeds, as ``fedkn compare`` does.

    >>> result = fedkn.compare(normalizer=["kernel", "group"], batch_size=[2, 8], seeds=5)
    >>> result.tests[["first", "second", "difference", "p_holm"]]

    Args:
        file: a TOML file of settings, or a table (a dict) as such a file holds.
        out: the run folder; by default runs/ and ``name``, or the time.
        progress: True, False, or a function that is told how far it is.
        settings: keys of docs/configuration.md, dotted or nested: ``{"train.momentum": 0.9}``.
        command: what the run folder records as what repeats the run; by default this call.
        short: as for `run`; normalizer, batch_size, partition and learning_rate may be lists, and
            seeds and workers are those of the comparison; axis is a table of further settings and
            the values that each is to take: ``{"strategy.name": ["fedavg", "scaffold"]}``.

    Raises:
        UserError: settings that cannot work; nothing was written.
        FedknError: the disk; what was done is kept, and `resume` goes on with it.

    Cells that fail are told of at once, and counted in `Result.failed`.
    """
    grid = GridConfig.resolve(table_of(file), keys_of(short, COMPARE), keys_of(settings or {}, {}))
    command = command or _call("compare", file, out, settings, short)
    grid, folder = created(grid, "compare", _path(out), command)
    if progress is True:
        _say([model_sentence(grid), *told(planned(grid, folder.partitions()))])
    return _carried_out(grid, folder, progress)


def _say(sentences: Iterable[str]) -> None:
    console = terminal(stderr=True)
    for sentence in sentences:
        console.print(sentence, soft_wrap=True, highlight=False, markup=False)


def resume(
    folder: str | PathLike[str],
    *,
    root: str | PathLike[str] | None = None,
    seeds: int | None = None,
    normalizer: Any = None,
    batch_size: Any = None,
    workers: int | None = None,
    progress: Progress = True,
) -> Result:
    """Go on with a run that was stopped or killed; it ends in the same numbers.

    Cells that are completed are kept, those without a checkpoint begin anew, failed ones are tried
    again; of a run that is complete only the report is made anew.

    >>> fedkn.resume("runs/compare-20261123-064512")
    >>> fedkn.resume("docs/runs/hybridbn-small-bn", root="/data", seeds=6)
    >>> fedkn.resume("runs/study", normalizer=["fbn", "brn"])

    Args:
        folder: a run folder, of whichever machine.
        root: where its data lie here, if elsewhere; they must be the same.
        seeds: how many there are to be, no fewer than there are.
        normalizer, batch_size: further ones, as for `compare`: cells that come to those there are.
        workers: cells that run at the same time.
        progress: as for `compare`.

    Raises:
        UserError: no run folder, other data than it was begun with, or a fleet's run.
    """
    path = Path(folder)
    grid, opened = begun(path, {} if workers is None else {"compare.workers": workers})
    if opened.grid.deployed:
        again = how_to_resume_deployed(path)
        raise UserError(f"'{path}' is trained by a fleet's devices: go on with '{again}'")
    more = keys_of({"normalizer": normalizer, "batch_size": batch_size}, COMPARE)
    grid = amended(grid, opened, root=_path(root), seeds=seeds, more=more)
    refuse_other_data(grid, opened, lambda text: terminal(stderr=True).print(text, soft_wrap=True))
    check(grid)
    return _carried_out(grid, opened, progress)


def _single(*layers: Mapping[str, Any]) -> GridConfig:
    given = {key for layer in layers for key in layer}
    if "compare" in given:
        raise UserError(
            "a table [compare] describes a comparison: use fedkn.compare, fedkn compare"
        )
    grid = GridConfig.single(*layers)
    axes = {key for key in given if key.startswith("compare.")} - _OF_RUNS
    if axes or len(groups(grid)) != 1:
        raise UserError(
            "fedkn run runs one experiment, with one normalizer on one partition and one seed: "
            "use fedkn compare for several"
        )
    return grid


_OF_RUNS = {"compare.name", "compare.partitions"}


def _carried_out(
    grid: GridConfig, folder: RunFolder, progress: Progress, *, each_round: bool = False
) -> Result:
    """Run what is left of `grid` and build the report."""
    with _watching(progress, each_round=each_round) as watcher:
        again = how_to_resume(folder.path)
        try:
            totals = run_grid(grid, folder, watcher)
        except KeyboardInterrupt:
            watcher.notice(f"stopped; what was done is kept. Go on with: {again}")
            raise
        except LogNotWritten as error:
            raise FedknError(f"{error}. What was done is kept. Go on with: {again}") from error
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise FedknError(
                f"{error.strerror or error}{where}. What was done is kept: mend that, and go on "
                f"with: {again}"
            ) from error
        result = Result(folder)
        result.report()
        if totals.failed:
            watcher.notice(
                f"{totals.failed} of {totals.completed + totals.failed} result cells failed "
                f"(log: {folder.path / 'log.txt'}). Try them again with: {again}"
            )
    return result


@contextmanager
def _watching(progress: Progress, *, each_round: bool) -> Iterator[Watcher]:
    console = terminal(stderr=True)
    if callable(progress):
        with shown_progress(console, quiet=True) as notices:
            yield _Told(progress, notices)
    elif progress and each_round:
        yield RoundLines(console)
    else:
        with shown_progress(console, quiet=not progress) as watcher:
            yield watcher


class _Told:
    """A watcher that tells a function of the user's; what goes wrong is shown as ever."""

    def __init__(self, tell: Callable[[Board], None], notices: Watcher) -> None:
        self.update = tell
        self.notice = notices.notice


def _path(out: str | PathLike[str] | None) -> Path | None:
    return None if out is None else Path(out)


def _call(
    name: str,
    file: File,
    out: str | PathLike[str] | None,
    settings: Mapping[str, Any] | None,
    short: Mapping[str, Any],
) -> str:
    """Return the call that was made, as Python code."""
    given: list[str] = []
    if file is not None:
        given.append(repr(keys_of(file, {}) if isinstance(file, Mapping) else str(Path(file))))
    given += [f"{key}={value!r}" for key, value in keys_of(short, {}).items()]
    if settings:
        given.append(f"settings={keys_of(settings, {})!r}")
    if out is not None:
        given.append(f"out={str(Path(out))!r}")
    return f"fedkn.{name}({', '.join(given)})"
