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
    root: o.Root = None,
    seeds: o.Seeds = None,
    workers: o.Workers = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Go on with a run that was stopped or killed; it ends in the same numbers.

    Completed cells are kept, the others go on from their last checkpoint, or begin anew where there
    is none, failed ones are tried again. --root says where the same data lie on this machine,
    --seeds adds repetitions.

    Examples:

      fedkn resume runs/compare-20261123-064512

      fedkn resume docs/runs/hybridbn-small-bn --root ~/data --seeds 6
    """
    from simulations.api import running
    from simulations.commands.launch import carry_out

    carry_out(
        lambda: running.resume(
            folder, root=root, seeds=seeds, workers=workers, progress=not as_json
        ),
        as_json=as_json,
    )
