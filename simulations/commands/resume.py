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
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Where the same data lie on this machine.",
            show_default="where they lay",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Repetitions that there are to be, no fewer than there are.",
            show_default="as many as there are",
        ),
    ] = None,
    normalizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Normalizers that come to those there are.",
            show_default="none",
        ),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            metavar="N,…",
            help="Batch sizes that come to those there are.",
            show_default="none",
        ),
    ] = None,
    workers: o.Workers = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Go on with a run that was stopped or killed; it ends in the same numbers.

    Completed cells are kept, the others go on from their last checkpoint, or begin anew where there
    is none, failed ones are tried again. --root says where the same data lie on this machine,
    --seeds adds repetitions, --normalizer and --batch-size add cells: a long study in pieces.

    Examples:

      fedkn resume runs/compare-20261123-064512

      fedkn resume docs/runs/hybridbn-small-bn --root ~/data --seeds 6

      fedkn resume runs/study --normalizer fbn,brn --batch-size 1
    """
    from simulations.api import running
    from simulations.commands.launch import carry_out

    carry_out(
        lambda: running.resume(
            folder,
            root=root,
            seeds=seeds,
            normalizer=normalizer,
            batch_size=batch_size,
            workers=workers,
            progress=not as_json,
        ),
        as_json=as_json,
    )
