"""Text from outside, made safe to show: names of files and classes, what devices send."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: object, limit: int = 400) -> str:
    """Return `text` on one line of at most `limit` characters that a terminal shows as they are.

    Whitespace of any kind becomes single spaces. Characters that do not print (control characters,
    escape sequences, marks that reverse the direction of text, bytes of file names that are no
    UTF-8) are written as Python would write them, such as ``\\x1b``. What is left out is marked
    by "…". Not an escape for HTML, CSV or matplotlib: whoever writes those escapes for them too.
    """
    # Of a text of megabytes no more is looked at than can be shown.
    seen = str(text)[: 4 * limit + 4]
    line = "".join(c if c.isprintable() else _escaped(c) for c in " ".join(seen.split()))
    if len(line) <= limit and len(str(text)) <= len(seen):
        return line
    return line[: limit - 1].rstrip() + "…"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
