"""``fedkn compare``: normalizers under small batches."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    from simulations.api import running
    from simulations.commands.launch import carry_out, repeat_command

    exact = axes_given(axis) | given(settings)
    carry_out(
        lambda: running.compare(
            file,
            normalizer=normalizer,
            batch_size=batch_size,
            partition=partition,
            seeds=seeds,
            learning_rate=learning_rate,
            source=source,
            root=root,
            download=download or None,
            clients=clients,
            cohort=cohort,
            rounds=rounds,
            model=model,
            seed=seed,
            workers=workers,
            name=name,
            settings=exact,
            out=out,
            progress=not as_json,
            command=repeat_command(),
        ),
        as_json=as_json,
    )
