"""``fedkn report``: the report of a run, from its folder alone."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from simulations.commands import options as o

__all__ = ["report"]


def report(
    *,
    folders: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Rebuild the report of runs, finished or not, and print its table.

    Example:

      fedkn report runs/demo-20261123-064512
    """
    from fedkn.errors import UserError
    from simulations.api.result import load
    from simulations.terminal import terminal

    runs = [load(folder) for folder in folders]
    written: list[Path | None] = []
    problem = None
    for run in runs:
        try:
            written.append(run.report())
        except UserError as error:
            # The numbers can be shown all the same.
            written.append(None)
            problem = problem or error
    if as_json:
        summaries = [
            {"report": path and str(path), **run.summary()}
            for run, path in zip(runs, written, strict=True)
        ]
        sys.stdout.write(json.dumps({"runs": summaries}) + "\n")
    else:
        console = terminal()
        for run, path in zip(runs, written, strict=True):
            console.print(run.table())
            if path:
                console.print(f"Report:  {path}", soft_wrap=True)
    if problem:
        raise problem
