"""The grid of a comparison: its axes, its configuration, and its cells.

A grid is one experiment (every table of `fedkn.config.ExperimentConfig`) plus the axes in a
``[compare]`` table:

    rounds = 15
    [data]
    source = "digits"
    [compare]
    normalizers = ["kernel", "group"]
    batch_sizes = [1, 2]
    partitions = ["dirichlet:alpha=0.3", "shards:shards_per_client=2"]
    seeds = 5
    [compare.axes]
    "strategy.name" = ["fedavg", "scaffold"]

A group is one normalizer x batch size x partition x value of every further axis: it has one
learning-rate search and one result cell for each seed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from fedkn import normalizers
from fedkn.config import ExperimentConfig, PartitionConfig
from fedkn.errors import UserError, unknown_name
from fedkn.options import read_options
from fedkn.references import is_reference
from fedkn.sections import Scalar, check_keys, validated
from fedkn.tables import nest, shown
from simulations.comparison.axes import (
    Settings,
    checked_axes,
    combinations,
    point_at,
    slug,
    taken_out,
)
from simulations.comparison.settings import LARGEST_SEED_COUNT, CompareConfig
from simulations.runs.axes import Point, point_label

__all__ = [
    "Cell",
    "CompareConfig",
    "GridConfig",
    "Group",
    "Purpose",
    "cells_in",
    "experiments",
    "groups",
    "partitions",
    "result_cells",
    "search_cells",
    "searches",
    "seeds",
    "untrainable",
]

Purpose = Literal["search", "result"]

_MOST_CELLS = 100_000


class GridConfig(ExperimentConfig):
    """One experiment and the axes along which it is varied."""

    compare: CompareConfig = CompareConfig()

    @classmethod
    def resolve(cls, *layers: Any) -> Self:
        """Return the grid of the defaults overlaid by each of `layers`; see ExperimentConfig."""
        rest: list[dict[str, Any]] = []
        axes: dict[str, Any] = {}
        for layer in layers:
            if not isinstance(layer, Mapping):
                raise UserError(f"{shown(layer)}: must be a table of settings")
            without, found = taken_out(layer)
            rest.append(without)
            axes |= found
        grid = super().resolve(*rest)
        if axes:
            checked = checked_axes(grid.experiment, axes)
            compare = grid.compare.model_copy(update={"axes": checked})
            grid = grid.model_copy(update={"compare": compare})
        if (cells := cells_in(grid)) > _MOST_CELLS:
            raise UserError(
                f"a comparison of {cells:,} cells is too large ({_MOST_CELLS:,} at most): give "
                "fewer values, seeds or learning rates"
            )
        for experiment in experiments(grid).values():
            _check_experiment(grid, experiment)
        return grid

    @classmethod
    def single(cls, *layers: Any) -> Self:
        """Return the grid of one experiment, of `layers` as in `resolve`: nothing is searched."""
        one = {"compare.seeds": 1, "compare.workers": 1}
        own = super().resolve(*(taken_out(layer)[0] for layer in layers), one)
        axes = {
            "compare.normalizers": own.normalizer.name,
            "compare.batch_sizes": own.train.batch_size,
            "compare.learning_rates": own.train.learning_rate,
        }
        return cls.resolve(*layers, one, axes)

    @property
    def experiment(self) -> ExperimentConfig:
        """The experiment that every cell varies."""
        return ExperimentConfig.resolve(self.model_dump(exclude={"compare"}))


@dataclass(frozen=True)
class Group:
    """The cells that share a learning rate: one normalizer, batch size, partition and point."""

    id: str
    """Readable and safe as a file name: ``kernel-b2-dirichlet0.3``."""
    normalizer: str
    batch_size: int
    partition: PartitionConfig
    settings: Settings = ()
    """Of the further axes."""

    @property
    def point(self) -> Point:
        """Where the group stands on the further axes."""
        return point_at(self.settings)

    @property
    def place(self) -> str:
        """The partition and the point in words, short: ``dirichlet0.3, strategy.name scaffold``."""
        partition = self.id.removeprefix(f"{_stem(self.normalizer, self.batch_size)}-")
        partition = partition.removesuffix(f"-{slug(self.settings)}")
        return ", ".join(filter(None, (partition, point_label(self.point))))


@dataclass(frozen=True)
class Cell:
    """One experiment of the grid. Its id names its folder and its lines in metrics.jsonl."""

    id: str
    purpose: Purpose
    group: Group
    config: ExperimentConfig

    def __post_init__(self) -> None:
        expected = {"search": "validation", "result": "test"}[self.purpose]
        if self.config.evaluation.split != expected:
            raise ValueError(f"a {self.purpose} cell must be evaluated on the {expected} split")


def file_name(normalizer: str) -> str:
    """Return the name of a normalizer as part of a file's: ``mypackage.norms-Mine`` if it is own.

    Different names stay different.
    """
    if is_reference(normalizer):
        return normalizer.replace(":", "-")  # which no other part of it holds
    plain = re.sub(r"[^A-Za-z0-9_.+]", "_", normalizer)
    if plain == normalizer:
        return plain
    digest = hashlib.sha256(normalizer.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{plain[:60]}-{digest[:10]}"


def groups(grid: GridConfig) -> tuple[Group, ...]:
    """Return the groups of `grid`, in the order of its axes."""
    return tuple(
        Group(
            "-".join(filter(None, (_stem(normalizer, batch_size), name, slug(settings)))),
            normalizer,
            batch_size,
            partition,
            settings,
        )
        for settings in combinations(grid.compare.axes)
        for name, partition in _partitions(grid).items()
        for normalizer in grid.compare.normalizers
        for batch_size in grid.compare.batch_sizes
    )


def experiments(grid: GridConfig) -> dict[Point, ExperimentConfig]:
    """Return the experiment at every point of the further axes.

    The grid's own, where it has none.
    """
    own = grid.experiment
    try:
        return {
            point_at(settings): ExperimentConfig.resolve(own.flat(), _varied(grid, settings))
            if settings
            else own
            for settings in combinations(grid.compare.axes)
        }
    except UserError as error:
        raise UserError(f"a combination of the axes is impossible: {error}") from None


def cells_in(grid: GridConfig) -> int:
    """Return how many cells `grid` has, unless a search goes beyond its rates."""
    compare = grid.compare
    tried = len(compare.learning_rates) * compare.search_seeds if searches(grid) else 0
    return (
        len(compare.normalizers)
        * len(compare.batch_sizes)
        * max(1, len(compare.partitions))
        * math.prod(len(values) for values in compare.axes.values())
        * (compare.seeds + tried)
    )


def partitions(grid: GridConfig) -> tuple[PartitionConfig, ...]:
    """Return the partitions of `grid`, in the order of its axis."""
    return tuple(_partitions(grid).values())


def seeds(grid: GridConfig, purpose: Purpose) -> range:
    """Return the seeds of a group's cells. No seed serves both purposes.

    So no result is measured on the very partition and cohorts its learning rate was chosen on.
    """
    if purpose == "search":
        first = grid.seed + LARGEST_SEED_COUNT
        return range(first, first + grid.compare.search_seeds)
    return range(grid.seed, grid.seed + grid.compare.seeds)


def search_cells(grid: GridConfig, group: Group, learning_rate: float) -> tuple[Cell, ...]:
    """Return the cells that try `learning_rate` on the validation split, one for each seed."""
    rounds: dict[str, Scalar] = {}
    if grid.compare.search_rounds:
        rounds["rounds"] = grid.compare.search_rounds
    return tuple(
        _cell(
            grid,
            group,
            f"search-{group.id}-lr{learning_rate:g}-s{seed}",
            "search",
            {"seed": seed, "train.learning_rate": learning_rate, **rounds},
        )
        for seed in seeds(grid, "search")
    )


def result_cells(grid: GridConfig, group: Group, learning_rate: float) -> tuple[Cell, ...]:
    """Return the cells that measure `group` on the test split, one for each seed."""
    return tuple(
        _cell(
            grid,
            group,
            f"{group.id}-s{seed}",
            "result",
            {"seed": seed, "train.learning_rate": learning_rate},
        )
        for seed in seeds(grid, "result")
    )


def searches(grid: GridConfig) -> bool:
    """Whether learning rates are searched: a single one is used as it is."""
    return len(grid.compare.learning_rates) > 1


def untrainable(group: Group) -> str:
    """Return why `group` cannot be trained, empty if it can."""
    needed = normalizers.create(group.normalizer).minimum_batch
    if group.batch_size >= needed:
        return ""
    return f"{group.normalizer} needs a local batch of at least {needed}"


def _check_experiment(grid: GridConfig, experiment: ExperimentConfig) -> None:
    """Raise UserError for what `grid` cannot do with the experiment of one point."""
    if searches(grid) and experiment.data.validation_fraction == 0:
        raise UserError(
            "data.validation_fraction = 0 leaves no images to search a learning rate on: "
            "raise it, or give a single compare.learning_rates"
        )
    options = read_options(experiment.normalizer.options)
    known = {name for each in grid.compare.normalizers for name in normalizers.options(each)}
    for option in options.keys() - known if options else ():
        raise unknown_name("option of these normalizers", option, known)
    for spec in grid.compare.partitions:
        partition = _partition(grid.partition, spec)
        if experiment.cohort > partition.clients:
            raise UserError(
                f"cohort ({experiment.cohort}) is larger than the {partition.clients} clients of "
                f"partition '{spec}': lower cohort"
            )


def _stem(normalizer: str, batch_size: int) -> str:
    return f"{file_name(normalizer)}-b{batch_size}"


def _partitions(grid: GridConfig) -> dict[str, PartitionConfig]:
    if not grid.compare.partitions:
        return {_slug(grid.partition, grid.partition): grid.partition}
    specs = (_partition(grid.partition, spec) for spec in grid.compare.partitions)
    return {_slug(partition, grid.partition): partition for partition in specs}


def _slug(partition: PartitionConfig, own: PartitionConfig) -> str:
    setting = {
        "dirichlet": f"{partition.alpha:g}",
        "shards": str(partition.shards_per_client),
        "labels": str(partition.labels_per_client),
        "quantity": f"{partition.sigma:g}",
    }
    slug = partition.scheme + setting.get(partition.scheme, "")
    for key in ("clients", "minimum"):
        if getattr(partition, key) != getattr(own, key):
            slug += f"-{key}{getattr(partition, key)}"
    return slug


def _partition(own: PartitionConfig, spec: str) -> PartitionConfig:
    """Return `own` changed by a spec such as ``dirichlet:alpha=0.3:minimum=4``."""
    scheme, *settings = spec.split(":")
    values: dict[str, Scalar] = {**own.model_dump(), "scheme": scheme}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(
                f"partition '{spec}': write settings as name=value, as in dirichlet:alpha=0.3"
            )
        values[key] = value
    try:
        check_keys(PartitionConfig, values)
        return validated(PartitionConfig, values)
    except UserError as error:
        raise UserError(f"partition '{spec}': {error}") from None


def _varied(grid: GridConfig, settings: Settings) -> dict[str, Any]:
    """Return one value of every axis as settings: of a file of weights, with its pinned hash."""
    varied = dict(settings)
    pins = dict(zip(grid.compare.axes.get(_WEIGHTS, ()), grid.compare.weights_sha256, strict=False))
    if pins:
        varied[f"{_WEIGHTS}_sha256"] = pins.get(varied[_WEIGHTS], "")
    return nest(varied)


_WEIGHTS = "model.weights"


def _cell(
    grid: GridConfig, group: Group, name: str, purpose: Purpose, own: dict[str, Scalar]
) -> Cell:
    layers: list[dict[str, Any]] = [
        grid.experiment.flat(),
        _varied(grid, group.settings),
        {"partition": group.partition.model_dump()},
        {
            "normalizer.name": group.normalizer,
            "train.batch_size": group.batch_size,
            "evaluation.split": "validation" if purpose == "search" else "test",
            "checkpoint.cell": name,
        },
        own,
    ]
    known, axes = normalizers.options(group.normalizer), dict(group.settings)
    if "groups" not in known and "normalizer.groups" not in axes:
        layers.append({"normalizer.groups": 0})
    options = read_options(ExperimentConfig.resolve(*layers).normalizer.options)
    own_options = {
        key: value
        for key, value in options.items()
        if key in known or f"normalizer.options.{key}" in axes
    }
    layers.append({"normalizer.options": json.dumps(own_options) if own_options else ""})
    return Cell(name, purpose, group, ExperimentConfig.resolve(*layers))
