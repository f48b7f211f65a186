"""``fedkn compare``: normalizers under small batches."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkn.tables import read_toml
from simulations.commands import options as o
from simulations.commands.options import axes_given, given

__all__ = ["compare"]


def compare(
    *,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE.toml]", help="A comparison; options override it."),
    ] = None,
    normalizer: o.Normalizers = None,
    batch_size: o.BatchSizes = None,
    partition: o.Partitions = None,
    axis: o.AxisValues = None,
    seeds: o.Seeds = None,
    learning_rate: o.LearningRates = None,
    source: o.SourceName = None,
    root: o.Root = None,
    download: o.Download = False,
    clients: o.Clients = None,
    cohort: o.Cohort = None,
    rounds: o.Rounds = None,
    model: o.Model = None,
    seed: o.Seed = None,
    workers: o.Workers = None,
    settings: o.Settings = None,
    name: o.Name = None,
    out: o.Out = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Compare normalizers x batch sizes x partitions x seeds, and write a report.

    For each of these and each value of further axes the learning rate is searched on validation
    images; the results are measured on test images. Stop it with Ctrl-C, go on with fedkn resume.

    Examples:

      fedkn compare --normalizer kernel,group,batch --batch-size 1,2,4,8 --seeds 5

      fedkn compare --source mnist --root ~/data --download --partition iid,dirichlet:alpha=0.1

      fedkn compare --normalizer kernel,group --axis strategy.name=fedavg,scaffold

      fedkn compare mine.toml --rounds 30 --set train.momentum=0.9 --name momentum
    """
    from simulations.commands import launch
    from simulations.comparison.grid import GridConfig

    flags = axes_given(axis) | given(
        settings,
        compare__normalizers=normalizer,
        compare__batch_sizes=batch_size,
        compare__partitions=partition,
        compare__seeds=seeds,
        compare__learning_rates=learning_rate,
        compare__workers=workers,
        compare__name=name,
        data__source=source,
        data__root=None if root is None else str(root),
        data__download=download or None,
        partition__clients=clients,
        cohort=cohort,
        rounds=rounds,
        model__name=model,
        seed=seed,
    )
    grid = GridConfig.resolve(read_toml(file) if file else {}, flags)
    grid, run = launch.created(grid, "compare", out)
    launch.execute(grid, run, as_json=as_json)
