"""Axes beyond normalizer, batch size and partition: which settings a cell has of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from fedkn.config import ExperimentConfig
from fedkn.options import read_options

__all__ = ["RUN", "Point", "point_label", "point_of", "settings_of", "value_of", "value_text"]

Point = tuple[tuple[str, str], ...]
"""Where a cell stands: of every axis its key, and the value as text, in the order of the axes."""

RUN = "run"
"""The axis along which runs are set side by side: its values are their names, it is no setting."""


def settings_of(config: ExperimentConfig) -> dict[str, object]:
    """Return the settings by dotted key; those of a table of options each by its own."""
    settings: dict[str, object] = {}
    for key, value in config.flat().items():
        if key.endswith(".options"):
            options = read_options(str(value))
            settings |= {f"{key}.{name}": option for name, option in options.items()}
        else:
            settings[key] = value
    return settings


def value_of(config: ExperimentConfig, key: str) -> object:
    """Return the setting with the dotted `key`, an option of a table of options among them.

    None where an experiment has no such setting.
    """
    return settings_of(config).get(key)


def value_text(value: object) -> str:
    """Return a setting as a point has it: ``scaffold``, ``0.9``, ``true``."""
    return value if isinstance(value, str) else json.dumps(value)


def point_of(config: ExperimentConfig, axes: Iterable[str]) -> Point:
    """Return where an experiment stands on the axes with these keys; `RUN` is left out."""
    return tuple((key, value_text(value_of(config, key))) for key in axes if key != RUN)


def point_label(point: Sequence[tuple[str, str]]) -> str:
    """Return a point as people read it: ``strategy.name scaffold, train.momentum 0.9``."""
    return ", ".join(f"{key} {value or 'empty'}" for key, value in point)
