"""Further axes of a comparison: any setting of an experiment, with the values that it is to take.

    [compare.axes]
    "strategy.name" = ["fedavg", "scaffold"]
    "model.options.depth" = [1, 2]

On the command line: ``--axis strategy.name=fedavg,scaffold``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, TypeVar

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.sections import Scalar
from fedkn.tables import flattened, nest, shown
from simulations.runs.axes import Point, value_of, value_text

__all__ = ["Axes", "Settings", "checked_axes", "combinations", "point_at", "slug", "taken_out"]

Axes = Mapping[str, tuple[Scalar, ...]]
"""The values that each key is to take, in the order given."""

Settings = tuple[tuple[str, Scalar], ...]
"""One value of every axis."""

_MOST_AXES = 8
_LONGEST_SLUG = 80

# What a comparison varies, or a run sets, by itself.
_INSTEAD = {
    "normalizer.name": "give --normalizer (compare.normalizers)",
    "train.batch_size": "give --batch-size (compare.batch_sizes)",
    "train.learning_rate": "give --learning-rate (compare.learning_rates): each group has its own",
    "seed": "give --seeds (compare.seeds)",
    "partition": "give --partition (compare.partitions), as iid,dirichlet:alpha=0.1:clients=10",
    "evaluation.split": "rates are chosen on validation images, results are on test images",
    "checkpoint": "a run sets it by itself",
    "compare": "an axis is a setting of an experiment",
}

ConfigT = TypeVar("ConfigT", bound=ExperimentConfig)


def taken_out(layer: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a layer of settings without its ``compare.axes``, and these by key.

    Raises:
        UserError: the axes are no table.
    """
    rest: dict[str, Any] = {}
    axes: dict[str, Any] = {}
    for key, value in layer.items():
        if key == "compare" and isinstance(value, Mapping) and "axes" in value:
            axes |= flattened(_table(value["axes"]))
            rest[key] = {name: of for name, of in value.items() if name != "axes"}
        elif key == "compare.axes":
            axes |= flattened(_table(value))
        elif key.startswith("compare.axes."):
            axes[key.removeprefix("compare.axes.")] = value
        else:
            rest[key] = value
    return rest, axes


def checked_axes(experiment: ExperimentConfig, axes: Mapping[str, Any]) -> Axes:
    """Return the values of `axes` as the experiment's settings have them, each once.

    A text is split at its commas, as a command line gives it.

    Raises:
        UserError: an axis that is none, or a value that its setting cannot have.
    """
    if len(axes) > _MOST_AXES:
        raise UserError(
            f"{len(axes)} axes are too many to compare along: give {_MOST_AXES} at most"
        )
    for key in axes:
        if (own := next((of for of in _INSTEAD if key == of or key.startswith(f"{of}.")), "")) and (
            instead := _INSTEAD[own]
        ):
            raise UserError(f"{shown(key)} cannot be a further axis: {instead}")
        if key.endswith(".options"):
            raise UserError(f"axis '{key}' is a table of options: give one of them, as {key}.NAME")
    return {key: _values(experiment, key, given) for key, given in axes.items()}


def combinations(axes: Axes) -> tuple[Settings, ...]:
    """Return every combination of the axes' values; a single empty one where there is no axis."""
    return tuple(tuple(zip(axes, values, strict=True)) for values in product(*axes.values()))


def point_at(settings: Settings) -> Point:
    """Return the point of the axes at which an experiment has `settings`."""
    return tuple((key, value_text(value)) for key, value in settings)


def slug(settings: Settings) -> str:
    """Return `settings` as a part of a file's name, which no other settings have; empty for none.

    Readable where they are short and plain, such as ``strategy.name_scaffold``.
    """
    point = point_at(settings)
    if not point:
        return ""
    readable = "-".join(f"{key}_{value}" for key, value in point)
    plain = re.sub(r"[^A-Za-z0-9_.+-]+", ".", readable)
    if plain == readable and len(plain) <= _LONGEST_SLUG and not _ambiguous(point):
        return readable
    digest = hashlib.sha256(repr(point).encode("utf-8", "surrogatepass")).hexdigest()
    return f"{plain[:_LONGEST_SLUG]}-{digest[:10]}"


def _ambiguous(point: Point) -> bool:
    """Whether joined texts might be those of another point."""
    return len(point) > 1 and any("-" in value for _, value in point)


def _table(axes: object) -> Mapping[str, Any]:
    if not isinstance(axes, Mapping):
        raise UserError(
            f"compare.axes = {shown(axes)}: must be a table of settings and their values, as "
            '{"strategy.name" = ["fedavg", "scaffold"]}'
        )
    return axes


def _values(experiment: ExperimentConfig, key: str, given: Any) -> tuple[Scalar, ...]:
    if isinstance(given, str):
        # What a command line gives is text, and its setting says what it spells.
        layers: list[dict[str, Any]] = [
            {key: text.strip()} for text in given.split(",") if text.strip()
        ]
    else:
        values: Sequence[Any] = given if isinstance(given, list | tuple) else [given]
        layers = [nest({key: _scalar(key, value)}) for value in values]
    if not layers:
        raise UserError(f"axis '{key}' has no values: give some, as --axis {key}=VALUE,VALUE")
    found: dict[str, Any] = {}
    for layer in layers:
        value = value_of(_at(experiment, key, layer), key)
        found.setdefault(value_text(value), value)
    return tuple(found.values())


def _scalar(key: str, value: Any) -> Scalar:
    if not isinstance(value, str | int | float | bool):
        raise UserError(f"axis '{key}': {shown(value)} is no plain value")
    return value


def _at(experiment: ExperimentConfig, key: str, layer: Mapping[str, Any]) -> ExperimentConfig:
    try:
        return ExperimentConfig.resolve(experiment.flat(), layer)
    except UserError as error:
        raise UserError(f"axis '{key}': {error}") from None
