"""``fedkn run``: one experiment."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkn.errors import UserError
from fedkn.tables import read_toml
from simulations.commands import options as o
from simulations.commands.options import given

__all__ = ["run"]

_PANEL = "The experiment"


def run(
    *,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE.toml]", help="An experiment; options override it."),
    ] = None,
    normalizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=_PANEL, help="kernel, group, batch, …"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", rich_help_panel=_PANEL, help="Local batch size.")
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(metavar="SPEC", rich_help_panel=_PANEL, help="As dirichlet:alpha=0.3."),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(metavar="X", rich_help_panel=_PANEL, help="Local learning rate."),
    ] = None,
    source: o.SourceName = None,
    root: o.Root = None,
    download: o.Download = False,
    clients: o.Clients = None,
    cohort: o.Cohort = None,
    rounds: o.Rounds = None,
    model: o.Model = None,
    seed: o.Seed = None,
    settings: o.Settings = None,
    name: o.Name = None,
    out: o.Out = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Run one experiment, print a line for every round, and write a report.

    Examples:

      fedkn run --normalizer kernel --batch-size 2 --rounds 15

      fedkn run mine.toml --learning-rate 0.1 --set strategy.name=fedadam
    """
    from simulations.commands import launch
    from simulations.comparison.grid import GridConfig, groups

    table = read_toml(file) if file else {}
    if "compare" in table:
        raise UserError(f"'{file}' describes a comparison: use fedkn compare {file}")
    flags = given(
        settings,
        normalizer__name=normalizer,
        train__batch_size=batch_size,
        train__learning_rate=learning_rate,
        compare__partitions=partition,
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
    grid = GridConfig.single(table, flags)
    if len(groups(grid)) != 1 or any(text.startswith("compare.") for text in settings or ()):
        raise UserError(
            "fedkn run runs one experiment, with one normalizer on one partition and one seed: "
            "use fedkn compare for several"
        )
    grid, folder = launch.created(grid, "run", out)
    launch.execute(grid, folder, as_json=as_json, each_round=True)
