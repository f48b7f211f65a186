"""The processes that run the cells of a comparison, and the GPUs that they run them on."""

from __future__ import annotations

import selectors
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.gpus import GpuState, visible_gpus
from fedkn.machine import usable_cores
from simulations.comparison.grid import GridConfig
from simulations.comparison.sharing import GpuSharing, of_one_kind
from simulations.comparison.worker import Worker, WorkerDiedError

__all__ = ["Ended", "Target", "WorkerPool", "cells_at_once"]


class Target(NamedTuple):
    """A GPU for cells: `gpu` is all that their process sees (empty: everything), where it is
    `device`.
    """

    gpu: str
    device: str

    def __str__(self) -> str:
        return f"GPU {self.gpu}" if self.gpu else self.device


NO_GPU = Target("", "")


@dataclass(frozen=True)
class Ended:
    """A cell that its process is done with.

    Attributes:
        error: in one line; empty where there was none. died: whether its process is gone.
        full: whether it found its GPU's memory full. beside: how many other cells were on that GPU
            since it began, at most.
    """

    cell: str
    error: str
    died: bool = False
    full: bool = False
    beside: int = 0


@dataclass
class _Process:
    worker: Worker
    target: Target
    cell: str = ""
    """What it runs; empty: nothing."""


class WorkerPool:
    """Up to `size` processes that run cells.

    Where there are GPUs to spread cells over, a process sees one of them, and a cell begins only
    where its memory is expected to fit (`GpuSharing`).

    Args:
        start: starts a process on a target.
        device: the comparison's. size: how many processes there are at most. One by itself sees
            every GPU, over which its engine spreads the cell's clients.
    """

    def __init__(self, start: Callable[[Target], Worker], device: str, size: int) -> None:
        self._start = start
        self._size = size
        self._targets = _targets(device)[:size] if size > 1 else []
        self._selector = selectors.DefaultSelector()
        self._processes: list[_Process] = []
        self._sharing: GpuSharing | None = None

    def open(self) -> list[str]:
        """Start a process on each GPU, hear what it is, and return what is to be told of that.

        Raises:
            UserError: there are GPUs, and none of them can be used.
        """
        if not self._targets:
            return []
        for target in self._targets:
            self._begin_process(target)
        found: dict[int, GpuState | str] = {}
        while len(found) < len(self._targets):
            for process in self._ready(None):
                at = self._targets.index(process.target)
                try:
                    for message in process.worker.messages():
                        if "gpu" in message:
                            state = message["gpu"]
                            known = isinstance(state, dict)
                            found[at] = GpuState(**state) if known else str(state)
                except WorkerDiedError as death:
                    self._end_process(process)
                    found.setdefault(at, str(death))
        free, reasons = of_one_kind(dict(sorted(found.items())))
        told = [f"{self._targets[at]} is left out: {reason}" for at, reason in reasons.items()]
        if not free:
            raise UserError(f"no GPU can be used ({'; '.join(told)}): give device = 'cpu'")
        for process in list(self._processes):
            if self._targets.index(process.target) not in free:
                self._end_process(process)
        self._sharing = GpuSharing(free)
        return told

    def begin(
        self, cells: Iterable[tuple[str, Hashable, ExperimentConfig]], *, alone: frozenset[str]
    ) -> list[str]:
        """Begin those of the `cells` (id, kind, configuration) that can run now; return their ids.

        In their order, but one that does not fit anywhere does not hold up the next. Those that
        need a GPU `alone` come before the others; the first of them gets the next that is empty.
        """
        begun: list[str] = []
        kept: int | None = None
        for cell, kind, config in sorted(cells, key=lambda of: of[0] not in alone):
            if len(self._busy()) >= self._size:
                break
            target, place = NO_GPU, None
            if self._sharing is not None:
                room = self._sharing if kept is None else self._sharing.without(kept)
                place = room.place(kind, alone=cell in alone)
                if place is None:
                    if cell in alone and kept is None:
                        kept = self._sharing.least_busy()
                    continue
                self._sharing.begin(cell, kind, place, alone=cell in alone)
                target = self._targets[place]
            process = self._process_on(target)
            process.cell = cell
            process.worker.submit(config)
            begun.append(cell)
        if self._sharing is not None:
            # They hold memory, as long as they live.
            for process in [process for process in self._processes if not process.cell]:
                self._end_process(process)
        return begun

    def ended(self, patience: float) -> list[Ended]:
        """Return the cells that have ended, waiting up to `patience` seconds for the first."""
        ended: list[Ended] = []
        for process in self._ready(patience):
            try:
                for message in process.worker.messages():
                    ended += self._take(process, message)
            except WorkerDiedError as death:
                self._end_process(process)
                if process.cell:
                    ended.append(self._left(process, str(death), died=True))
        return ended

    def settle(self, cell: str) -> None:
        """Note that `cell` has trained and evaluated: its memory is what its like will take."""
        if self._sharing is not None:
            self._sharing.settle(cell)

    def close(self) -> None:
        """End all processes."""
        for process in list(self._processes):
            self._end_process(process)
        self._selector.close()

    def _take(self, process: _Process, message: dict[str, Any]) -> list[Ended]:
        if "reserved" in message and self._sharing is not None:
            self._sharing.reserved(process.cell, int(message["reserved"]))
        if "error" not in message:
            return []
        if not message["error"]:
            self.settle(process.cell)
        return [self._left(process, message["error"], full=bool(message.get("full")))]

    def _left(
        self, process: _Process, error: str, *, died: bool = False, full: bool = False
    ) -> Ended:
        cell, process.cell = process.cell, ""
        beside = 0 if self._sharing is None else self._sharing.end(cell)
        return Ended(cell, error, died, full, beside)

    def _busy(self) -> list[_Process]:
        return [process for process in self._processes if process.cell]

    def _process_on(self, target: Target) -> _Process:
        """Return an idle process on `target`, started if there is none."""
        idle = [process for process in self._processes if not process.cell]
        for process in idle:
            if process.target == target:
                return process
        if len(self._processes) >= self._size:
            self._end_process(idle[0])
        return self._begin_process(target)

    def _begin_process(self, target: Target) -> _Process:
        process = _Process(self._start(target), target)
        self._processes.append(process)
        self._selector.register(process.worker, selectors.EVENT_READ, process)
        return process

    def _end_process(self, process: _Process) -> None:
        self._selector.unregister(process.worker)
        self._processes.remove(process)
        process.worker.stop()

    def _ready(self, patience: float | None) -> list[_Process]:
        return [key.data for key, _ in self._selector.select(patience)]


def cells_at_once(grid: GridConfig) -> int:
    """Return how many cells of `grid` run at the same time at most: one a core, or a GPU."""
    return grid.compare.workers or max(usable_cores(), len(_targets(grid.device)))


def _targets(device: str) -> list[Target]:
    if device in ("auto", "cuda"):
        return [Target(gpu, "cuda") for gpu in visible_gpus()]
    return [Target("", device)] if device.startswith("cuda") else []
