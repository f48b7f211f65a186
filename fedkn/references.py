"""A user's own part by its name: ``package.module:name``, or a name that a package has registered.

Everything that the catalogue names can be somebody's own: a model, a source, a task, a normalizer,
a strategy, an observer. Whoever looks a name up asks `find`, and cannot tell whose part it is.

A package registers parts in its pyproject.toml, where anybody who installs it finds them::

    [project.entry-points."fedkn.models"]
    mynet = "mypackage.networks:mynet"
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from importlib import import_module, invalidate_caches
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedkn.data.vision import with_torchvision
from fedkn.errors import UserError, raised_at, unknown_name
from fedkn.generators import generators_kept
from fedkn.text import printable

__all__ = [
    "Kind",
    "find",
    "is_reference",
    "load_reference",
    "look_here",
    "module_of",
    "registered",
    "where_raised",
]

Kind = Literal["model", "source", "task", "normalizer", "strategy", "observer"]
PartT = TypeVar("PartT")


def find(kind: Kind, name: str, own: Mapping[str, PartT]) -> PartT | Any:
    """Return the part called `name`: of our `own`, by reference, or as a package registered it.

    A name of our own is never another's: who registers it again is not asked.

    Raises:
        UserError: there is none of that name, naming the nearest one, or it cannot be loaded.
    """
    if name in own:
        return own[name]
    if is_reference(name):
        return load_reference(kind, name)
    if (entry := _registered(kind).get(name)) is not None:
        return _guarded(kind, name, entry.load)
    raise unknown_name(kind, name, [*own, *_registered(kind)])


def is_reference(name: str) -> bool:
    """Whether `name` has the form ``package.module:name``."""
    module, colon, attribute = name.partition(":")
    parts = (*module.split("."), *attribute.split("."))
    return bool(colon) and all(part.isidentifier() for part in parts)


def registered(kind: Kind) -> tuple[str, ...]:
    """Return the names that installed packages have registered for `kind`, sorted."""
    return tuple(sorted(_registered(kind)))


def module_of(kind: Kind, name: str) -> str | None:
    """Return the module that a part of somebody's own is in; None for a name that is not one's own.

    The module is looked for where `load_reference` looks, and not imported.
    """
    if is_reference(name):
        module = name.partition(":")[0]
    elif (entry := _registered(kind).get(name)) is not None:
        module = entry.module
    else:
        return None
    look_here(module.partition(".")[0])
    return module


def load_reference(kind: Kind, reference: str) -> Any:
    """Return what ``package.module:name`` names.

    The current folder is looked in too, after everything that is installed, so that a file beside
    the configuration is found.

    Raises:
        UserError: there is no such module or it lacks the name, or importing it failed.
    """
    module, _, attribute = reference.partition(":")

    def load() -> Any:
        look_here(module.partition(".")[0])
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return found

    return _guarded(kind, reference, load)


def where_raised(error: Exception) -> str:
    """Return in brackets where somebody's own code failed; empty where that is not known."""
    if (place := raised_at(error)) is None:
        return ""
    file, line = place
    return f" ({printable(file)}, line {line})"


def _guarded(kind: Kind, name: str, load: Callable[[], Any]) -> Any:
    shown = f"{kind} '{printable(name, 120)}'"
    try:
        with generators_kept():
            return with_torchvision(load)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(
            f"{shown}: there is no module '{printable(error.name)}' here: start fedkn in the "
            "folder that has it, install its package (pip install -e .), or set PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise UserError(f"{shown}: {_said(error)}{_names_of(name)}") from error
    except Exception as error:
        # Somebody's module runs when it is imported, and may fail of anything.
        raise UserError(
            f"{shown} cannot be imported: {_said(error)}{where_raised(error)}"
        ) from error


def look_here(package: str) -> None:
    """Let modules of the current folder be found: an installed program does not look there."""
    here = str(Path.cwd())
    if here in sys.path or package in sys.modules:
        return
    try:
        known = find_spec(package) is not None
    except (ImportError, ValueError):
        known = False
    if not known:
        sys.path.append(here)
        invalidate_caches()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {printable(error, 200)}"


def _names_of(reference: str) -> str:
    module = sys.modules.get(reference.partition(":")[0])
    public: Iterable[str] = () if module is None else vars(module)
    names = [name for name in public if not name.startswith("_")]
    return f" (it has {printable(', '.join(names), 200)})" if names else ""


@lru_cache(maxsize=16)
def _registered(kind: Kind) -> Mapping[str, EntryPoint]:
    group = {"strategy": "fedkn.strategies"}.get(kind, f"fedkn.{kind}s")
    return {entry.name: entry for entry in entry_points(group=group)}
