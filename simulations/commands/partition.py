"""``fedkn partition``: which client holds how many images of which label."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedkn.errors import UserError
from fedkn.tables import read_toml
from simulations.commands import options as o
from simulations.commands.options import given

__all__ = ["partition"]


def partition(
    *,
    spec: Annotated[
        str | None, typer.Argument(metavar="[SPEC]", help="Such as dirichlet:alpha=0.3 or iid.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE.toml", help="Take data and partition from this file."),
    ] = None,
    source: o.SourceName = None,
    root: o.Root = None,
    download: o.Download = False,
    clients: o.Clients = None,
    seed: o.Seed = None,
    settings: o.Settings = None,
    picture: Annotated[
        Path, typer.Option(metavar="PATH", help="Where the picture goes (.png, .svg or .pdf).")
    ] = Path("partition.png"),
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show how the training images are divided among the clients, and save a picture of it.

    Examples:

      fedkn partition dirichlet:alpha=0.1 --clients 20

      fedkn partition shards:shards_per_client=2 --source mnist --root ~/data --picture shards.png
    """
    from simulations.comparison.grid import GridConfig
    from simulations.comparison.preflight import count_labels
    from simulations.partition_view import partition_table, save_picture
    from simulations.terminal import terminal

    if picture.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--picture {picture}: the name must end in .png, .svg or .pdf")
    flags = given(
        settings,
        compare__partitions=spec,
        data__source=source,
        data__root=None if root is None else str(root),
        data__download=download or None,
        partition__clients=clients,
        seed=seed,
    )
    # No cohort is drawn here: one client always fits.
    layers = (read_toml(file) if file else {}, flags, {"cohort": 1})
    tables = count_labels(GridConfig.single(*layers))
    save_picture(tables, picture)
    if as_json:
        shown = {"picture": str(picture), "partitions": [asdict(table) for table in tables]}
        sys.stdout.write(json.dumps(shown) + "\n")
        return
    console = terminal()
    for table in tables:
        console.print(partition_table(table))
    console.print(f"Picture:  {picture}", soft_wrap=True)
