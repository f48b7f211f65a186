"""``fedkn run``: one experiment."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkn.errors import UserError
from fedkn.tables import read_toml
from simulations.commands import choices
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
        typer.Option(
            metavar="NAME",
            rich_help_panel=_PANEL,
            help=f"Of {choices.NORMALIZERS}, {choices.OWN}.",
            show_default="kernel",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=_PANEL,
            help="Local batch size, 1 or more.",
            show_default="2",
        ),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            rich_help_panel=_PANEL,
            help=f"Of {choices.PARTITIONS}, with settings of partition.*, as dirichlet:alpha=0.3.",
            show_default="partition.scheme: dirichlet",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            rich_help_panel=_PANEL,
            help="Local learning rate, above 0.",
            show_default="0.05",
        ),
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
    from simulations.api import running
    from simulations.commands.launch import carry_out, repeat_command

    if file and "compare" in read_toml(file):
        raise UserError(f"'{file}' describes a comparison: use fedkn compare {file}")
    exact = given(settings)
    carry_out(
        lambda: running.run(
            file,
            normalizer=normalizer,
            batch_size=batch_size,
            learning_rate=learning_rate,
            partition=partition,
            source=source,
            root=root,
            download=download or None,
            clients=clients,
            cohort=cohort,
            rounds=rounds,
            model=model,
            seed=seed,
            name=name,
            settings=exact,
            out=out,
            progress=not as_json,
            command=repeat_command(),
        ),
        as_json=as_json,
    )
