"""What fedkn raises when the user can mend it, and the nearest-name hint that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fedkn.text import printable

__all__ = ["FedknError", "UserError", "unknown_name"]


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


# A longer list of valid names would bury the nearest one.
_LISTED = 24
