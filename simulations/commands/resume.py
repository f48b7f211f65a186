"""``fedkn resume``: go on with a run that was stopped."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simulations.commands import options as o

__all__ = ["resume"]


def resume(
    *,
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    workers: o.Workers = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Go on with a run that was stopped or killed; it ends in the same numbers.

    Completed cells are kept, the others go on from their last checkpoint, failed ones are tried
    again.

    Example:

      fedkn resume runs/compare-20261123-064512
    """
    from simulations.api import running
    from simulations.commands.launch import carry_out

    carry_out(
        lambda: running.resume(folder, workers=workers, progress=not as_json), as_json=as_json
    )
