"""The observers that a configuration names, and what each of them takes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError, unknown_name
from fedkn.observer import Observer
from fedkn.options import read_options
from fedkn.references import find
from fedkn.text import printable
from server.observers.log_lines import LogLines
from server.observers.untouched import untouched

__all__ = ["TRACKERS", "check_observers", "create_observers"]

TRACKERS = {
    "mlflow": "server.observers.mlflow:MLflow",
    "tensorboard": "server.observers.tensorboard:TensorBoard",
    "wandb": "server.observers.wandb:WeightsAndBiases",
}
"""Ours, each an extra of the same name."""

_LOG = logging.getLogger("flwr")
_CALLS = [name for name in vars(Observer) if not name.startswith("_")]


def check_observers(config: ExperimentConfig) -> None:
    """Raise UserError for an observer that is not there, or an option that none of them takes."""
    _with_options(config)


def create_observers(config: ExperimentConfig) -> list[tuple[str, object]]:
    """Return the observers of `config`, by name, new ones.

    One that cannot be made is named in a warning: the run does without it.

    Raises:
        UserError: as `check_observers`.
    """
    made: list[tuple[str, object]] = [("log lines", LogLines())]
    for name, factory, options in _with_options(config):
        try:
            with untouched():
                observer = factory(**options)
        except UserError:
            raise
        except Exception as error:
            _LOG.warning(
                "observer '%s' cannot be made (%s: %s): the run goes on without it",
                *(printable(name, 120), type(error).__name__, printable(error, 200)),
            )
            continue
        _refuse_no_observer(name, observer)
        made.append((name, observer))
    return made


def _with_options(
    config: ExperimentConfig,
) -> list[tuple[str, Callable[..., object], dict[str, Any]]]:
    names = [name for name in config.observers.names.split(",") if name]
    options = read_options(config.observers.options)
    if options and not names:
        raise UserError("observers.options are set, but no observers.names that could take them")
    factories = {name: _factory(name) for name in names}
    taken = {name: _taken(factory, options) for name, factory in factories.items()}
    for option in options:
        if not any(option in of for of in taken.values()):
            valid = [name for factory in factories.values() for name in _parameters(factory)]
            raise unknown_name("option in observers.options", option, valid)
    return [
        (name, factory, {option: options[option] for option in taken[name]})
        for name, factory in factories.items()
    ]


def _factory(name: str) -> Callable[..., object]:
    with untouched():
        found = find("observer", name, TRACKERS)
        if name in TRACKERS:
            found = _ours(name, found)
    if not callable(found):
        raise UserError(f"observer '{printable(name, 120)}' is no class and no function")
    if isinstance(found, type):
        _refuse_no_observer(name, found)
    factory: Callable[..., object] = found
    return factory


def _ours(name: str, where: str) -> Callable[..., object]:
    module, _, attribute = where.partition(":")
    try:
        found: Callable[..., object] = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise UserError(
            f"observer '{name}' needs '{error.name}': pip install 'fedkn[{name}]'"
        ) from None
    return found


def _refuse_no_observer(name: str, part: object) -> None:
    if not any(hasattr(part, call) for call in _CALLS):
        raise UserError(
            f"observer '{printable(name, 120)}' has none of the methods of an observer: "
            f"{', '.join(_CALLS)}"
        )


def _taken(factory: Callable[..., object], options: Iterable[str]) -> list[str]:
    parameters = _parameters(factory)
    return [name for name in options if name in parameters or "**" in parameters]


def _parameters(factory: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """Return the parameters that can be given by keyword; ``**`` where any can."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # made in C
        return {}
    found = {}
    for name, parameter in parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found["**"] = parameter
        elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            found[name] = parameter
    return found
