"""What the command line prints, on any terminal: one that has no "±", one that acts on brackets."""

from __future__ import annotations

import codecs
import io
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["name_cell", "plain_where_needed", "shown_steps", "terminal"]

_ERRORS = "fedkn-plain"


def plain_where_needed() -> None:
    """Make standard output and error write every character: as it is, alike, or as ``\\xNN``.

    Without this the results of a finished run are lost on a terminal (or in a pipe) whose encoding
    lacks one character of them.
    """
    for stream in (sys.stdout, sys.stderr):
        # What a test or a notebook puts in their place takes any text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def name_cell(cell: str) -> None:
    """Let every line of this process's log name `cell`, without colours where no terminal is.

    Cells that run at once write into one file.
    """
    log = logging.getLogger("flwr")
    for earlier in [one for one in log.filters if isinstance(one, _Named)]:
        log.removeFilter(earlier)
    log.addFilter(_Named(cell))


class _Named(logging.Filter):
    def __init__(self, cell: str) -> None:
        super().__init__()
        self._cell = cell

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = f"{self._cell}: {record.getMessage()}", ()
        # Here, because Flower makes its handlers when it is imported, and colours what they write.
        for handler in logging.getLogger("flwr").handlers:
            if isinstance(handler, logging.StreamHandler) and hasattr(handler, "colored"):
                handler.colored = handler.stream.isatty()
        return True


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that shows text as it is: no markup, no emoji codes, no highlights.

    In a notebook too, which rich would give a block of HTML for every line.
    """
    return Console(
        stderr=stderr,
        quiet=quiet,
        markup=False,
        emoji=False,
        highlight=False,
        force_jupyter=False,
    )


@contextmanager
def shown_steps(console: Console) -> Iterator[Callable[[str], None]]:
    """Yield a function that is told what begins: on a terminal it is shown while it lasts.

    Elsewhere it is a line, with the seconds since the first.
    """
    if console.is_terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False)
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as shown:
            task = shown.add_task("", total=None)
            yield lambda step: shown.update(task, description=step)
    else:
        begin = time.monotonic()
        yield lambda step: console.print(
            f"{time.monotonic() - begin:4.0f} s  {step}", soft_wrap=True
        )


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    written = error.object[error.start : error.end]
    plain = (_ALIKE.get(c) or c.encode("ascii", "backslashreplace").decode() for c in written)
    return "".join(plain), error.end


# The characters of fedkn's own output that not every terminal has.
_ALIKE = {
    "±": "+-",
    "–": "-",
    "−": "-",
    "→": "->",
    "…": "...",
    "·": ".",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "†": "+",
    "ε": "epsilon",
    "δ": "delta",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "µ": "u",
}
codecs.register_error(_ERRORS, _plain)
