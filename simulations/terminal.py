"""What the command line prints, on any terminal: one that has no "±", one that acts on brackets."""

from __future__ import annotations

import codecs
import io
import sys

from rich.console import Console

__all__ = ["plain_where_needed", "terminal"]

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


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that shows text as it is: no markup, no emoji codes, no highlights."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)


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
