"""Everything that can be known to be wrong with a grid, found before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedkn.algorithms import federation_rule, keeps_model
from fedkn.config import ExperimentConfig, PartitionConfig
from fedkn.data.partition import client_names, label_counts
from fedkn.errors import UserError
from fedkn.experiment import build_model, device_of, federated_data, normalizer_of, try_parts
from fedkn.normalizers import TensorRole
from fedkn.training import refuse_unprivate
from server.observers import check_observers
from server.strategies.registry import create_strategy
from simulations.comparison.grid import (
    GridConfig,
    experiments,
    groups,
    partitions,
    result_cells,
    searches,
    seeds,
    untrainable,
)
from simulations.runs.axes import Point, point_label
from simulations.runs.records import EXAMPLES, PartitionRecord, partition_label

__all__ = ["check", "count_labels"]


def check(grid: GridConfig) -> list[PartitionRecord]:
    """Check names, data, partitions and models of `grid`.

    Returns:
        The label counts of every partition, for each seed of the results.

    Raises:
        UserError: the first thing found that would make cells fail, naming what to change.
    """
    reasons = [untrainable(group) for group in groups(grid)]
    if all(reasons):
        raise UserError(f"nothing can be trained: {reasons[0]}; give a larger batch size")
    for point, experiment in experiments(grid).items():
        with _at(point):
            create_strategy(experiment)
            check_observers(experiment)
            device_of(experiment)
    for point, experiment in _data_of(grid).items():
        with _at(point):
            for partition in partitions(grid):
                for seed in seeds(grid, "search") if searches(grid) else ():
                    _count(experiment, partition, seed)
    tables = count_labels(grid)
    _check_models(grid)
    return tables


def count_labels(grid: GridConfig) -> list[PartitionRecord]:
    """Return client x label counts of every partition of `grid`, for each seed of the results.

    Where the grid varies the data, they are those of its own experiment, or of the first point.
    Raises UserError where the data or a partition of them cannot be had.
    """
    tables: list[list[PartitionRecord]] = []
    for point, experiment in _data_of(grid).items():
        with _at(point):
            tables.append(
                [
                    _count(experiment, partition, seed)
                    for partition in partitions(grid)
                    for seed in seeds(grid, "result")
                ]
            )
    return tables[0]


@contextmanager
def _at(point: Point) -> Iterator[None]:
    """Let an error say at which point of the axes it is."""
    try:
        yield
    except UserError as error:
        if not point:
            raise
        raise UserError(f"with {point_label(point)}: {error}") from None


def _data_of(grid: GridConfig) -> dict[Point, ExperimentConfig]:
    """Return the experiments that differ in their clients' images, each by its first point."""
    found: dict[object, Point] = {}
    every = experiments(grid)
    for point, experiment in every.items():
        found.setdefault((experiment.data, experiment.evaluation.client_fraction), point)
    return {point: every[point] for point in found.values()}


def _count(experiment: ExperimentConfig, partition: PartitionConfig, seed: int) -> PartitionRecord:
    config = experiment.model_copy(update={"partition": partition, "seed": seed})
    data = federated_data(config)
    train, notes = data.train, list(data.notes)
    label = partition_label(partition)
    names = list(client_names(partition.scheme, partition.clients, train.origins))
    if train.labels is None:
        sizes = [[len(part)] for part in data.parts]
        return PartitionRecord(label, seed, [EXAMPLES], sizes, notes, names)
    counts = label_counts(train.labels, data.parts, train.num_classes)
    return PartitionRecord(label, seed, list(train.classes), counts.tolist(), notes, names)


def _check_models(grid: GridConfig) -> None:
    by_normalizer = {(group.normalizer, group.point): group for group in groups(grid)}
    keep_tensors = []
    for (name, point), group in by_normalizer.items():
        config = result_cells(grid, group, grid.compare.learning_rates[0])[0].config
        with _at(point):
            normalizer, model = normalizer_of(config), build_model(config)
            if config.privacy.mechanism == "example":
                refuse_unprivate(normalizer, model, config.train.precision)
            rule = federation_rule(config, normalizer, model)
            try_parts(config, model)
        if config.evaluation.client_fraction:
            continue
        if TensorRole.LOCAL in normalizer.federation_rule(model).values():
            keep_tensors.append(name)
        elif TensorRole.LOCAL in rule.values() or keeps_model(config):
            keep_tensors.append(config.strategy.name)
    if keep_tensors:
        keepers = [*dict.fromkeys(keep_tensors)]
        keep = "keeps" if len(keepers) == 1 else "keep"
        raise UserError(
            f"{', '.join(keepers)} {keep} tensors on the clients: set "
            "evaluation.client_fraction (say 0.2), so that each client's own model can be evaluated"
        )
