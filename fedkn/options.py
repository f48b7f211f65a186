"""Tables of options that fedkn does not know: those of a user's own model, source or task.

Such a table is one setting, because Flower's run config carries only settings that were declared:
a string that holds a JSON object. In TOML it is a table, on the command line each option has a
dotted key of its own.

    [model.options]
    depth = 3

    --set model.options.depth=3

    flwr run --run-config 'model.options="{\\"depth\\": 3}"'
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator

from fedkn.errors import UserError
from fedkn.tables import flattened, shown

__all__ = ["Options", "read_options", "with_options"]


def read_options(text: str) -> dict[str, Any]:
    """Return the options that a setting of type `Options` holds, as keyword arguments."""
    options: dict[str, Any] = json.loads(text) if text else {}
    return options


def with_options(
    keys: Iterable[str], before: Mapping[str, Any], layer: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the dotted settings `before` overlaid by those of `layer`, dotted or nested.

    Of a setting in `keys`, which are tables of options, the layer may give some options (by dotted
    key or as a table), which leave the others as they are, or all (as a JSON object).

    Raises:
        UserError: a layer or its options are no tables.
    """
    result = dict(before)
    given = flattened(layer)
    dotted = {key for key in layer if "." in key}
    for key in keys:
        some = {name: given.pop(name) for name in [*given] if name.startswith(f"{key}.")}
        if not some:
            continue
        whole = given.pop(key, result.get(key, ""))
        options = read_options(_canonical(whole, key))
        for name, value in some.items():
            # What a command line gives is text; a table has types of its own.
            typed = _typed(value) if name in dotted else value
            options[name.removeprefix(f"{key}.")] = typed
        given[key] = _canonical(options, key)
    return result | given


def _typed(value: Any) -> Any:
    """Return a text as the JSON value that it spells, else as it is: 3, true, "3", three."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _canonical(value: Any, key: str = "") -> str:
    """Return options as the text of a JSON object, the same for the same options."""
    where = f"{key}: " if key else ""
    if isinstance(value, str):
        if not value.strip():
            return ""
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f"{where}{shown(value)} is no JSON object of options") from None
    if not isinstance(value, Mapping):
        raise UserError(f"{where}must be a table of options, not {shown(value)}")
    for name, option in value.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"{where}{shown(name)} cannot be the name of an option")
        if not all(isinstance(one, str | int | float | bool) for one in _each(option)):
            raise UserError(
                f"{where}option '{name}' must be a text, a number, true, false or a list of them"
            )
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False) if value else ""
    except ValueError:
        raise UserError(f"{where}every number must be finite") from None


def _each(option: Any) -> Iterable[Any]:
    return option if isinstance(option, list | tuple) else (option,)


Options = Annotated[str, BeforeValidator(_canonical)]
"""A setting that holds options: the text of a JSON object, or empty."""
