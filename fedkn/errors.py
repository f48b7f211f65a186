"""What fedkn raises when the user can mend it, and the nearest-name hint that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fedkn.text import printable

__all__ = ["FedknError", "UserError", "raised_at", "unknown_name"]


class FedknError(Exception):
    """Base class of the errors that fedkn raises on purpose."""


class UserError(FedknError, ValueError):
    """Bad input: one clear line that names the fix. The CLI prints it and exits with code 2."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """Return the error for an unknown `name` of `kind`, naming the nearest valid one.

    Example: ``raise unknown_name("normalizer", "kernal", NAMES)`` reads
    "unknown normalizer 'kernal': did you mean 'kernel'? (valid: batch, group, …)".
    """
    choices, name = sorted(valid), printable(name, 80)
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hints = [f"did you mean '{nearest[0]}'?"] if nearest else []
    if not nearest or len(choices) <= _LISTED:
        hints.append(f"(valid: {', '.join(choices)})")
    return UserError(f"unknown {kind} '{name}': {' '.join(hints)}")


def raised_at(error: Exception) -> tuple[str, int] | None:
    """Return file and line of the last code that was run, which is most often what to mend."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return None if frame is None else (frame.tb_frame.f_code.co_filename, frame.tb_lineno)


# A longer list of valid names would bury the nearest one.
_LISTED = 24
