"""Runs the cells of a grid in parallel processes, to the end or to be resumed later.

What remains to do follows from metrics.jsonl alone, so starting and resuming are the same thing.
A cell that raises is recorded as failed and the others go on; a worker that dies fails only its
cell, which is tried once more from its checkpoint; a cell that found the GPU full which it shared
with others is run again with one for itself. When this process dies, its workers end too.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from fedkn.config import ExperimentConfig
from fedkn.locks import held
from server.metrics_log import MetricsLog
from simulations.comparison.grid import Cell, GridConfig, Group, groups, result_cells, untrainable
from simulations.comparison.pool import Ended, Target, WorkerPool, cells_at_once
from simulations.comparison.search import search
from simulations.comparison.worker import Worker
from simulations.runs.folder import RunFolder
from simulations.runs.history import History

__all__ = ["RUNNER", "Board", "Totals", "Watcher", "expected_cost", "run_grid"]

RUNNER = "simulations.engines.run:run_experiment"
"""What runs one cell: ``module:function``, called with the cell's configuration."""

_TICK = 0.25
_RETRIES = 1
_ROUNDS_SEEN = 2
"""After which a cell has taken every kind of step, and the initial model was evaluated."""


@dataclass(frozen=True)
class Board:
    """The state of a run, for whoever displays it."""

    total: int
    """Cells known to be needed by now: a search that goes beyond its grid adds some."""
    ended: int
    running: tuple[Cell, ...]
    waiting: tuple[Cell, ...]
    """Those of groups whose search is under way included."""
    workers: int
    history: History


class Watcher(Protocol):
    """Is told about the run as it goes."""

    def update(self, board: Board) -> None:
        """Show the state; called several times a second."""

    def notice(self, text: str) -> None:
        """Show one line that must not be missed, such as a failed cell."""


@dataclass(frozen=True)
class Totals:
    """How the result cells ended; failed search cells only narrow the search."""

    completed: int
    failed: int
    untrainable: int


def run_grid(grid: GridConfig, run: RunFolder, watcher: Watcher, *, runner: str = RUNNER) -> Totals:
    """Run every cell of `grid` that has not completed yet, and return how they ended.

    Failed result cells are tried again. Failed search cells only if every rate of their group's
    search failed: else it goes on, or its choice stands, as in the run that was stopped.

    Raises:
        UserError: another process runs this run folder; or there are GPUs, and none can be used.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; the workers are gone by then.
    """
    with ExitStack() as stack:
        lock = stack.enter_context(held(run.path))
        stack.enter_context(_signals_interrupt())
        scheduler = _Scheduler(grid, run, watcher, runner, lock)
        stack.callback(scheduler.close)
        return scheduler.run()


def expected_cost(config: ExperimentConfig) -> float:
    """Return the relative cost of a cell: local steps, each of a fixed part and one per image.

    Only ratios matter. The number of images of a client is left out, being equal across a grid
    but for `partition`; with a cap on local steps it is taken as 100.
    """
    train = config.train
    steps = 100 * train.local_epochs / train.batch_size
    if train.local_steps:
        steps = min(steps, train.local_steps * train.accumulate)
    return config.rounds * config.cohort * steps * (4 + train.batch_size)


@dataclass
class _GroupState:
    ready: tuple[Cell, ...]
    """Cells that can run now, running ones included."""
    left: tuple[Cell, ...]
    """Cells that have not ended, those that must wait for the search included."""
    total: int


class _Scheduler:
    def __init__(
        self, grid: GridConfig, run: RunFolder, watcher: Watcher, runner: str, lock: int | None
    ) -> None:
        self._grid = grid
        self._run = run
        self._watcher = watcher
        self._runner = runner
        self._lock = lock
        self._history = History(run.metrics_path)
        self._size = cells_at_once(grid)
        self._pool = WorkerPool(self._worker, grid.device, self._size)
        self._running: dict[str, Cell] = {}
        """By their ids."""
        self._started: dict[str, float] = {}
        self._began_at: dict[str, int] = {}
        """The rounds that a running cell had behind it."""
        self._deaths: dict[str, int] = {}
        self._alone: set[str] = set()
        """Cells that need a GPU for themselves."""
        self._warned: dict[str, int] = {}
        """How many of a cell's warnings were shown."""
        self._groups: dict[Group, _GroupState] = {}

    def run(self) -> Totals:
        self._begin()
        ready = self._ready()
        if ready:
            for text in self._pool.open():
                self._watcher.notice(text)
        while ready or self._running:
            ready = self._start(ready)
            ended = self._pool.ended(_TICK)
            self._history.poll()
            self._pass_on_warnings(*self._running.values())
            self._settle()
            for end in ended:
                self._receive(self._running.pop(end.cell), end)
            if ended:
                ready = self._ready()
            self._watcher.update(self._board())
        return self._totals()

    def close(self) -> None:
        self._pool.close()

    # -- what is to be done -----------------------------------------------------------------------

    def _begin(self) -> None:
        self._history.poll()
        if skipped := self._history.skipped:
            self._watcher.notice(
                f"{skipped} line(s) of '{self._run.metrics_path}' cannot be read, and are passed "
                "over"
            )
        for group in groups(self._grid):
            if reason := untrainable(group):
                self._skip(group, reason)
            else:
                self._forget_failures(group)
                self._refresh(group)

    def _skip(self, group: Group, reason: str) -> None:
        self._watcher.notice(f"{group.id} is not run: {reason}")
        for cell in self._results(group):
            if not self._history[cell.id].status:
                self._write_end(cell, "untrainable", reason)

    def _forget_failures(self, group: Group) -> None:
        state = search(self._grid, group, self._history)
        over_in_vain = state.chosen is None and not state.pending
        for cell in (*self._results(group), *(state.cells if over_in_vain else ())):
            if self._history[cell.id].status == "failed":
                self._history.forget_end(cell.id)

    def _refresh(self, group: Group) -> None:
        state = search(self._grid, group, self._history)
        results = self._results(group, state.chosen)
        if state.chosen is None and not state.pending:
            reason = next(
                (error for cell in state.cells if (error := self._history[cell.id].error)),
                "its loss was not finite",
            )
            for cell in results:
                if not self._history[cell.id].status:
                    self._fail(cell, f"every learning rate of its search failed: {reason}")
        left = tuple(cell for cell in results if not self._history[cell.id].status)
        self._groups[group] = _GroupState(
            ready=state.pending or left,
            left=state.pending + left,
            total=len(state.cells) + len(results),
        )

    def _results(self, group: Group, learning_rate: float | None = None) -> tuple[Cell, ...]:
        # Before the search is over any rate will do: a result cell's id does not depend on it.
        rate = learning_rate or self._grid.compare.learning_rates[0]
        return result_cells(self._grid, group, rate)

    def _ready(self) -> list[Cell]:
        """Return the cells that wait for a worker, longest first.

        A search cell counts with the result cell that can only begin after it.
        """
        ranked = []
        for state in self._groups.values():
            result = expected_cost(state.left[-1].config) if state.left else 0.0
            for cell in state.ready:
                if cell.id not in self._running:
                    follows = result if cell.purpose == "search" else 0.0
                    ranked.append((expected_cost(cell.config) + follows, cell))
        return [cell for _, cell in sorted(ranked, key=lambda pair: -pair[0])]

    def _pass_on_warnings(self, *cells: Cell) -> None:
        for cell in cells:
            known = self._history[cell.id].warnings
            for text in known[self._warned.get(cell.id, 0) :]:
                self._watcher.notice(f"{cell.id}: {text}")
            self._warned[cell.id] = len(known)

    # -- workers ----------------------------------------------------------------------------------

    def _worker(self, target: Target) -> Worker:
        return Worker(
            self._runner,
            self._run.path / "log.txt",
            held=(self._run.path, self._lock),
            gpu=target.gpu,
            device=target.device,
        )

    def _start(self, ready: list[Cell]) -> list[Cell]:
        """Begin those of the cells `ready` that can; return the others."""
        waiting = [(cell.id, _memory_kind(cell), self._placed(cell)) for cell in ready]
        begun = self._pool.begin(waiting, alone=frozenset(self._alone))
        for cell in ready:
            if cell.id in begun:
                self._running[cell.id] = cell
                self._started[cell.id] = time.monotonic()
                self._began_at[cell.id] = self._history[cell.id].round
        return [cell for cell in ready if cell.id not in begun]

    def _placed(self, cell: Cell) -> ExperimentConfig:
        # Cells that run at once share the cores; a cell by itself may have them all.
        workers = cell.config.workers or (1 if self._size > 1 else 0)
        return cell.config.overlay(
            checkpoint__folder=str(self._run.path.resolve()), workers=workers
        )

    def _settle(self) -> None:
        for cell in self._running:
            if self._history[cell].round >= self._began_at[cell] + _ROUNDS_SEEN:
                self._pool.settle(cell)

    def _receive(self, cell: Cell, end: Ended) -> None:
        if end.died:
            self._mourn(cell, end.error)
        elif end.full and end.beside:
            self._alone.add(cell.id)
            text = (
                f"its GPU was full beside {end.beside} other cell{'s' * (end.beside > 1)}: it is "
                "run again from its checkpoint, with a GPU for itself"
            )
            MetricsLog(self._run.path, cell.id).write("warning", text=text)
            self._history.poll()
            self._pass_on_warnings(cell)
            self._history.forget_end(cell.id)
            self._refresh(cell.group)
        else:
            self._finish(cell, end.error)

    def _mourn(self, cell: Cell, cause: str) -> None:
        self._deaths[cell.id] = self._deaths.get(cell.id, 0) + 1
        if self._deaths[cell.id] > _RETRIES:
            self._fail(cell, f"{cause}, again")
        else:
            self._watcher.notice(f"{cell.id}: {cause}; it is run again from its checkpoint")
        self._refresh(cell.group)

    def _finish(self, cell: Cell, error: str) -> None:
        self._history.poll()
        self._pass_on_warnings(cell)
        status = self._history[cell.id].status
        if error and status != "failed":
            self._write_end(cell, "failed", error)
        elif not status:
            error = "it returned without a result"
            self._write_end(cell, "failed", error)
        if error:
            self._watcher.notice(f"{cell.id} failed: {error}")
        elif cell.purpose == "search":
            # Nothing is ever resumed or exported from it, and a grid has many.
            for checkpoint in (self._run.path / "cells" / cell.id).glob("checkpoint-*"):
                checkpoint.unlink()
        self._refresh(cell.group)

    def _fail(self, cell: Cell, error: str) -> None:
        self._watcher.notice(f"{cell.id} failed: {error}")
        self._write_end(cell, "failed", error)

    def _write_end(self, cell: Cell, status: str, error: str) -> None:
        seconds = time.monotonic() - self._started.get(cell.id, time.monotonic())
        log = MetricsLog(self._run.path, cell.id)
        if not self._history[cell.id].begun:
            # What it was to be, for the report: its server did not come to say so.
            config = self._placed(cell).flat()
            log.write("start", time=time.time(), purpose=cell.purpose, config=config)
        log.write("end", status=status, seconds=seconds, error=error)
        self._history.poll()

    # -- what came of it --------------------------------------------------------------------------

    def _board(self) -> Board:
        left = [cell for state in self._groups.values() for cell in state.left]
        running = tuple(self._running.values())
        total = sum(state.total for state in self._groups.values())
        return Board(
            total=total,
            ended=total - len(left),
            running=running,
            waiting=tuple(cell for cell in left if cell.id not in self._running),
            workers=self._size,
            history=self._history,
        )

    def _totals(self) -> Totals:
        statuses = [
            self._history[cell.id].status
            for group in groups(self._grid)
            for cell in self._results(group)
        ]
        return Totals(
            completed=statuses.count("completed"),
            failed=statuses.count("failed"),
            untrainable=statuses.count("untrainable"),
        )


def _memory_kind(cell: Cell) -> Hashable:
    """Return what cells have in common that take as much memory."""
    return cell.group.normalizer, cell.group.batch_size, cell.group.point


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the run as Ctrl-C does: workers stopped, nothing left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP)
        # nohup ignores SIGHUP on purpose.
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
