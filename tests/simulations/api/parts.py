"""Own parts as a user's package has them, for tests that give them as objects."""

from __future__ import annotations

__all__ = ["Outer", "make", "other_name"]


def make() -> None:
    """Stand for a factory."""


class Outer:
    """Stand for a class with a class in it."""

    class Inner:
        """Is found by a dotted name."""


other_name = make
