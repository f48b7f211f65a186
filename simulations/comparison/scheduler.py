"""Runs the cells of a grid in parallel processes, to the end or to be resumed later.

What remains to do follows from metrics.jsonl alone, so starting and resuming are the same thing.
A cell that raises is recorded as failed and the others go on; a worker that dies fails only its
cell, which is tried once more from its checkpoint. When this process dies, its workers end too.
"""

from __future__ import annotations

import os
import selectors
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import torch

from fedkn.config import ExperimentConfig
from fedkn.locks import held
from fedkn.machine import usable_cores
from server.metrics_log import MetricsLog
from simulations.comparison.grid import Cell, GridConfig, Group, groups, result_cells, untrainable
from simulations.comparison.search import search
from simulations.comparison.worker import Worker, WorkerDiedError
from simulations.runs.folder import RunFolder
from simulations.runs.history import History

__all__ = ["RUNNER", "Board", "Totals", "Watcher", "expected_cost", "run_grid"]

RUNNER = "simulations.engines.run:run_experiment"
"""What runs one cell: ``module:function``, called with the cell's configuration."""

_TICK = 0.25
_RETRIES = 1


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
        UserError: another process runs this run folder.
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
        self._selector = selectors.DefaultSelector()
        cores = usable_cores()
        self._workers: list[Worker | None] = [None] * (grid.compare.workers or cores)
        # A cell may train its clients in several processes: together no more than there are cores.
        self._cell_workers = grid.workers or max(1, cores // len(self._workers))
        self._running: dict[int, Cell] = {}
        """By the worker's place in the list."""
        self._started: dict[str, float] = {}
        self._deaths: dict[str, int] = {}
        self._warned: dict[str, int] = {}
        """How many of a cell's warnings were shown."""
        self._groups: dict[Group, _GroupState] = {}

    def run(self) -> Totals:
        self._begin()
        ready = self._ready()
        count = len(self._workers)
        while ready or self._running:
            for place in range(count):
                if place not in self._running and ready:
                    self._start(place, ready.pop(0))
            ended = [self._receive(key.data) for key, _ in self._selector.select(_TICK)]
            self._history.poll()
            self._pass_on_warnings(*self._running.values())
            if any(ended):
                ready = self._ready()
            self._watcher.update(self._board())
        return self._totals()

    def close(self) -> None:
        self._selector.close()
        for worker in self._workers:
            if worker is not None:
                worker.stop()

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
        running = {cell.id for cell in self._running.values()}
        ranked = []
        for state in self._groups.values():
            result = expected_cost(state.left[-1].config) if state.left else 0.0
            for cell in state.ready:
                if cell.id not in running:
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

    def _start(self, place: int, cell: Cell) -> None:
        worker = self._workers[place]
        if worker is None:
            worker = Worker(
                self._runner,
                self._run.path / "log.txt",
                held=(self._run.path, self._lock),
                gpu=_gpu(self._grid.device, place) if len(self._workers) > 1 else "",
            )
            self._workers[place] = worker
            self._selector.register(worker, selectors.EVENT_READ, place)
        self._running[place] = cell
        self._started[cell.id] = time.monotonic()
        worker.submit(self._placed(cell))

    def _placed(self, cell: Cell) -> ExperimentConfig:
        # Cells that run at once share the cores; a cell by itself may have them all.
        workers = cell.config.workers or (1 if len(self._workers) > 1 else 0)
        return cell.config.overlay(
            checkpoint__folder=str(self._run.path.resolve()), workers=workers
        )

    def _receive(self, place: int) -> bool:
        """Take what a worker has to say; return whether a cell ended or its worker died."""
        worker = self._workers[place]
        assert worker is not None
        try:
            outcome = worker.outcome()
        except WorkerDiedError as death:
            self._selector.unregister(worker)
            worker.stop()
            self._workers[place] = None
            if place not in self._running:
                return False
            self._mourn(self._running.pop(place), str(death))
            return True
        if outcome is None:
            return False
        self._finish(self._running.pop(place), outcome["error"])
        return True

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
        ids = {cell.id for cell in running}
        total = sum(state.total for state in self._groups.values())
        return Board(
            total=total,
            ended=total - len(left),
            running=running,
            waiting=tuple(cell for cell in left if cell.id not in ids),
            workers=len(self._workers),
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


def _gpu(device: str, place: int) -> str:
    """Return the CUDA device of the worker at `place`: they take turns; empty where there is none.

    The worker sees no other, so that a cell's configuration does not depend on where it ran.
    """
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return devices[place % len(devices)]


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
