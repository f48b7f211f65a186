"""``fedkn export-table``: the numbers of a run, as files that other programs read."""

# ruff: noqa: PLC0415 - torch and pandas take seconds to import, and --help does not need them

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from simulations.commands import options as o

__all__ = ["export_table"]


class Format(StrEnum):
    """What a table is written as."""

    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


def export_table(
    *,
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    to: Annotated[Format, typer.Option(help="What to write; parquet needs pyarrow.")] = Format.CSV,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the files go (default: RUN/tables)."),
    ] = None,
    debug: o.Debug = False,
) -> None:
    """Write the tables of a run: cells, rounds, tests and learning rates, a file each.

    They are those that Python has as fedkn.load(RUN).cells and so on (docs/api.md).

    Example:

      fedkn export-table runs/demo --to parquet
    """
    from simulations.api.result import load
    from simulations.terminal import terminal

    console = terminal()
    for path in load(folder).export(to.value, out):
        console.print(str(path), soft_wrap=True)
