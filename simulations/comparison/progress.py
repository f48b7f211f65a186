"""What a person sees while a run is under way: a live table, or now and then a line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from simulations.comparison.duration import duration
from simulations.comparison.estimate import Estimator
from simulations.comparison.grid import Cell
from simulations.comparison.scheduler import Board, Watcher
from simulations.runs.axes import point_label
from simulations.runs.history import History
from simulations.whole_table import WholeTable

__all__ = ["RoundLines", "shown_progress"]

_LINE_INTERVAL = 10.0
_LIVE_INTERVAL = 0.5
_BAR_WIDTH = 40


@contextmanager
def shown_progress(console: Console, *, quiet: bool) -> Iterator[Watcher]:
    """Yield a watcher fit for `console`: live on a terminal, lines elsewhere, failures if quiet."""
    if quiet:
        yield _Notices(console)
    elif console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            yield _LiveTable(console, live)
    else:
        yield _Lines(console)


class RoundLines:
    """A line for every round: for a run of a single cell."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._cell: Cell | None = None
        self._shown = 0

    def update(self, board: Board) -> None:
        """Show the rounds that were evaluated since the last update."""
        # The last rounds may have been logged after the cell was last seen running.
        self._cell = board.running[0] if board.running else self._cell
        if self._cell is None:
            return
        rounds = self._cell.config.rounds
        evaluations = board.history[self._cell.id].evaluations
        for round_ in sorted(evaluations)[self._shown :]:
            value, loss = evaluations[round_]
            self._console.print(
                f"round {round_:>{len(str(rounds))}}/{rounds}  "
                f"{board.history[self._cell.id].metric.name} {value:.4f}  loss {loss:.4f}",
                highlight=False,
            )
        self._shown = len(evaluations)

    def notice(self, text: str) -> None:
        """Show a line at once."""
        _print_notice(self._console, text)


class _Notices:
    def __init__(self, console: Console) -> None:
        self._console = console

    def update(self, board: Board) -> None:
        pass

    def notice(self, text: str) -> None:
        _print_notice(self._console, text)


class _Lines(_Notices):
    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console)
        self._clock = clock
        self._estimator = Estimator(clock)
        self._next = clock()

    def update(self, board: Board) -> None:
        left = self._estimator.seconds_left(board)
        if self._clock() < self._next:
            return
        self._next = self._clock() + _LINE_INTERVAL
        running = ", ".join(_brief(cell, board.history) for cell in board.running)
        self._console.print(
            f"{board.ended} of {board.total} cells{_left(left)}; running: {running or 'none'}",
            highlight=False,
            soft_wrap=True,
        )


class _LiveTable(_Notices):
    def __init__(self, console: Console, live: Live) -> None:
        super().__init__(console)
        self._live = live
        self._estimator = Estimator()
        self._begin = self._next = time.monotonic()

    def update(self, board: Board) -> None:
        left = self._estimator.seconds_left(board)
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LIVE_INTERVAL
        self._live.update(self._picture(board, left), refresh=True)

    def _picture(self, board: Board, left: float | None) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text.assemble((str(board.ended), "bold"), f" of {board.total} cells"),
            ProgressBar(max(board.total, 1), board.ended, width=_BAR_WIDTH),
            f"{duration(time.monotonic() - self._begin)}{_left(left)}",
        )
        table = WholeTable(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("running", "", "batch", "partition", "round", "accuracy"):
            table.add_column(name, justify="right" if name in ("batch", "round") else "left")
        for cell in board.running:
            record = board.history[cell.id]
            table.add_row(
                cell.group.normalizer,
                _what(cell),
                str(cell.group.batch_size),
                cell.group.place,
                f"{record.round}/{cell.config.rounds}",
                _value(cell, board.history) or "…",
            )
        waiting = Text(f"{len(board.waiting)} waiting", style="dim")
        return Group(head, table, waiting)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", about {duration(seconds)} left"


def _what(cell: Cell) -> str:
    if cell.purpose == "search":
        return f"search, rate {cell.config.train.learning_rate:g}"
    return f"seed {cell.config.seed}"


def _where(cell: Cell) -> str:
    return ", ".join(filter(None, (point_label(cell.group.point), _what(cell))))


def _brief(cell: Cell, history: History) -> str:
    value = _value(cell, history)
    return (
        f"{cell.group.normalizer} batch {cell.group.batch_size} ({_where(cell)}) "
        f"round {history[cell.id].round}/{cell.config.rounds}"
        + (f" {history[cell.id].metric.name} {value}" if value else "")
    )


def _value(cell: Cell, history: History) -> str:
    last = history[cell.id].last_evaluations(1)
    return f"{last[0][0]:.3f}" if last and not math.isnan(last[0][0]) else ""


def _print_notice(console: Console, text: str) -> None:
    console.print(Text(text, style="yellow"), soft_wrap=True)
