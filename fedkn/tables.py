"""Tables of settings: read from TOML, as dotted keys or nested."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["flattened", "nest", "read_toml", "shown"]

_LONGEST_FILE = 1_000_000


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested tables: ``{"a.b": 1}`` into ``{"a": {"b": 1}}``."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        table = nested
        for name in path:
            table = table.setdefault(name, {})
        table[last] = value
    return nested


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file, with a UserError naming the file and line where it is malformed."""
    name = printable(path)
    try:
        # With the mark that some editors put before the first letter, and without.
        with Path(path).open(encoding="utf-8-sig") as file:
            text = file.read(_LONGEST_FILE + 1)  # of a device or a pipe there is no end
        if len(text) > _LONGEST_FILE:
            raise ValueError(f"longer than {_LONGEST_FILE} letters")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{name}': {printable(error)}") from None
    try:
        return tomllib.loads(text)
    # ValueError: also an integer of more digits than Python reads.
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{name}' is not valid TOML: {printable(error)}") from None


def flattened(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables as dotted keys. Raises UserError for what is no table."""
    if not isinstance(table, Mapping):
        raise UserError(f"{shown(table)}: must be a table of settings")
    try:
        return dict(_flatten(table))
    except RecursionError:
        raise UserError("the settings are nested too deeply: two levels are enough") from None


def shown(value: object) -> str:
    """Return a value as an error message quotes it: short, on one line."""
    try:
        return printable(repr(value), 80)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in a list in …
        return f"a {type(value).__name__} too large to be shown"


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
