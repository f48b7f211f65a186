"""Settings as keywords: the names of the command line's flags, any key, any table, own objects."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from fedkn.errors import UserError
from fedkn.tables import read_toml, shown

__all__ = [
    "COMPARE",
    "RUN",
    "File",
    "keys_of",
    "reference_to",
    "refuse_set_by_runs",
    "table_of",
]

File = str | PathLike[str] | Mapping[str, Any] | None
"""Settings to begin with: a TOML file, or the table that such a file holds."""

_COMMON = {
    "source": "data.source",
    "root": "data.root",
    "download": "data.download",
    "clients": "partition.clients",
    "partition": "compare.partitions",
    "model": "model.name",
    "strategy": "strategy.name",
    "task": "task.name",
    "observers": "observers.names",
    "name": "compare.name",
}
RUN = _COMMON | {
    "normalizer": "normalizer.name",
    "batch_size": "train.batch_size",
    "learning_rate": "train.learning_rate",
}
"""Of a run: the short names of settings, and the keys that they stand for."""
COMPARE = _COMMON | {
    "normalizer": "compare.normalizers",
    "batch_size": "compare.batch_sizes",
    "learning_rate": "compare.learning_rates",
    "seeds": "compare.seeds",
    "axis": "compare.axes",
    "workers": "compare.workers",
}
"""The same of a comparison, where a list is an axis."""

_SET_BY_RUNS = {
    "checkpoint.folder": "the run folder: --out, in Python out",
    "checkpoint.cell": "from its settings",
    "evaluation.split": "rates are chosen on validation images, results are on test images",
}


def table_of(file: File) -> dict[str, Any]:
    """Return the settings of `file`. Raises UserError where it cannot be read."""
    if file is None:
        return {}
    if isinstance(file, Mapping):
        return {key: _plain(key, value) for key, value in file.items()}
    return read_toml(Path(file))


def keys_of(settings: Mapping[str, Any], short: Mapping[str, str]) -> dict[str, Any]:
    """Return keywords as settings: `short` names as their keys, other keys and tables as they are.

    A short name whose value is a table is that table: ``model={"name": "resnet8", "width": 8}``;
    ``axis`` is a table in any case: ``{"strategy.name": ["fedavg", "scaffold"]}``.
    A value of None is not given. Functions and classes become references to them.

    Raises:
        UserError: a setting that a run makes itself, or an object that cannot be referred to.
    """
    keys = {}
    for name, value in settings.items():
        if value is None:
            continue
        table = isinstance(value, Mapping) and name != "axis"
        key = name if table else short.get(name, name)
        refuse_set_by_runs(key)
        keys[key] = _plain(name, value)
    return keys


def refuse_set_by_runs(key: str) -> None:
    """Raise UserError for a setting that every run makes itself."""
    if instead := _SET_BY_RUNS.get(key):
        raise UserError(f"{key}: a run sets it itself ({instead}): leave it out")


def reference_to(part: Any, name: str = "it") -> str:
    """Return ``module:qualified.name`` of a function or class; `name` is the setting it is for.

    Raises:
        UserError: cells run in processes of their own, which could not find it by that name.
    """
    module = getattr(part, "__module__", None)
    qualified = getattr(part, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualified, str):
        raise UserError(
            f"{name} = {shown(part)} is no function or class: name one that stands in a .py file"
        )
    problem = ""
    if module == "__main__":
        problem = "stands in the script or notebook itself"
    elif "<" in qualified:
        problem = "is defined inside a function"
    elif not _is_found(part, module, qualified):
        problem = f"is not what '{module}' has under that name"
    if problem:
        raise UserError(
            f"{name}: {shown(qualified)} {problem}, where the processes that train cannot find it: "
            f'put it into a .py file beside, and give it from there or as "file:{part.__name__}"'
        )
    return f"{module}:{qualified}"


def _is_found(part: Any, module: str, qualified: str) -> bool:
    try:
        found: Any = sys.modules.get(module) or import_module(module)
        for attribute in qualified.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError):
        return False
    return found is part


def _plain(name: str, value: Any) -> Any:
    """Return a value as settings hold it: own objects by reference, paths as text."""
    if isinstance(value, Mapping):
        return {key: _plain(f"{name}.{key}", entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, entry) for entry in value]
    if isinstance(value, PathLike):
        return fspath(value)
    if callable(value):
        return reference_to(value, name)
    return value
