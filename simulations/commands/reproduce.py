"""``fedkn reproduce``: a published table, run again."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from simulations.commands import options as o

__all__ = ["reproduce"]


class Scale(StrEnum):
    """How much of it is run."""

    SMALL = "small"
    PAPER = "paper"


def reproduce(
    *,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A published table; none: list them.")
    ] = None,
    scale: Annotated[
        Scale,
        typer.Option(help="small ends within an hour on 2 cores; paper is what the paper ran."),
    ] = Scale.SMALL,
    row: Annotated[
        list[str] | None,
        typer.Option(metavar="ROW", help="Run this row alone, repeatable.", show_default="all"),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=1000, help="Repetitions.", show_default="as the scale has it"
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Read the same images from another source, such as image_folder.",
            show_default="the table's own",
        ),
    ] = None,
    root: o.Root = None,
    download: o.Download = False,
    workers: o.Workers = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel="Output",
            help="Where the run folders, NAME-SCALE-ROW, and the table lie.",
        ),
    ] = Path("runs"),
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Run a published table again, and put its figures beside ours.

    Every row is a run folder of its own: finished rows are kept, others gone on with, and each can
    be run on another day or machine. Without --row the time that all rows take is said first.

    Examples:

      fedkn reproduce

      fedkn reproduce hybridbn --root ~/data --download

      fedkn reproduce hybridbn --scale paper --row hbn --seeds 1 --root ~/data
    """
    from simulations.commands.launch import repeat_command
    from simulations.reproduction import published
    from simulations.reproduction.outcome import rich_table, to_json
    from simulations.reproduction.reproduce import estimate, plans
    from simulations.reproduction.reproduce import reproduce as run_rows
    from simulations.terminal import terminal

    if name is None:
        _list()
        return
    of = published.table(name)
    given = {"data.source": source, "data.root": root and str(root), "data.download": download}
    changes = {key: value for key, value in given.items() if value}
    todo = plans(of, scale.value, row or [], out, seeds=seeds, changes=changes)
    notes = terminal(stderr=True)

    def say(text: str) -> None:
        if not as_json:
            notes.print(text, soft_wrap=True)

    if not row:
        estimate(todo, say)
    try:
        outcomes = run_rows(
            of,
            scale.value,
            todo,
            out,
            workers=workers,
            progress=not as_json,
            command=repeat_command(),
            say=say,
        )
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        sys.stdout.write(json.dumps(to_json(of, scale.value, outcomes)) + "\n")
    else:
        console = terminal()
        console.print(rich_table(of, scale.value, outcomes))
        for sentence in of.differences:
            console.print(f"- {sentence}", soft_wrap=True)
        console.print(f"Table:   {out / f'{of.name}-{scale.value}.md'}", soft_wrap=True)
    failed = {o.row.name for o in outcomes if o.best.n < o.planned}
    if failed & {plan.row.name for plan in todo}:
        raise typer.Exit(1)


def _list() -> None:
    from simulations.reproduction import published
    from simulations.terminal import terminal

    console = terminal()
    for name in published.names():
        of = published.table(name)
        rows = ", ".join(row.name for row in of.rows)
        console.print(f"{name}: {of.title} ({of.paper})\n  rows: {rows}", soft_wrap=True)
