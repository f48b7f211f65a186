"""``fedkn publish``: what of a run can be kept in a repository."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulations.commands import options as o

__all__ = ["publish"]


def publish(
    *,
    folders: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where they are kept.")] = Path(
        "docs/runs"
    ),
    debug: o.Debug = False,
) -> None:
    """Copy the numbers of runs, without checkpoints, data and paths, to where they are kept.

    fedkn report builds the page from the copy, and fedkn resume --root DATA goes on from it on any
    machine: finished cells count, others begin anew.

    Example:

      fedkn publish runs/hybridbn-small-bn runs/hybridbn-small-hbn
    """
    from simulations.runs import publishing
    from simulations.runs.flower_runs import open_run
    from simulations.terminal import terminal

    console = terminal()
    for run in [open_run(folder) for folder in folders]:
        console.print(str(publishing.publish(run, to)), soft_wrap=True)
