"""``fedkn bench engines``: whole federated runs by every engine and its rivals, in turn."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from fedkn.errors import UserError, unknown_name
from fedkn.files import write_atomically
from fedkn.text import printable
from simulations.commands.options import Debug, Json

__all__ = ["engines"]


def engines(
    *,
    task: Annotated[
        str,
        typer.Option(
            "--task",
            metavar="NAME,…",
            help="fixed, small, kernel, many; registered-N, cohort-N, width-N show how cost grows.",
        ),
    ] = "fixed,small",
    contender: Annotated[
        str,
        typer.Option(
            "--contender",
            metavar="NAME,…",
            help="auto, inprocess, batched, ray; loop-N by hand, pfl-N for pfl-research, in N "
            "processes. Ratios are to the first.",
        ),
    ] = "auto,inprocess,batched,ray,loop-1,loop-2",
    repetitions: Annotated[
        int, typer.Option("--repetitions", min=1, help="Runs of every contender; medians count.")
    ] = 3,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes of an engine, actors of Ray.")
    ] = 2,
    device: Annotated[
        str, typer.Option("--device", help="cpu, cuda or cuda:N, for all contenders.")
    ] = "cpu",
    allocator: Annotated[
        bool,
        typer.Option("--allocator", help="Give everybody the allocator setting of our engines."),
    ] = False,
    pfl: Annotated[
        Path | None,
        typer.Option(
            "--pfl", metavar="FOLDER", help="pfl-research's environment; made there if missing."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="It ends by then (0: when all is measured).")
    ] = 0.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the figures there as JSON, run by run."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time rounds of whole runs: fedkn's engines, a loop by hand, Flower on Ray, pfl-research."""
    from fedkn.config import ExperimentConfig
    from fedkn.experiment import device_of
    from simulations.benchmarks.engine_tasks import TASKS
    from simulations.benchmarks.engines import (
        CONTENDERS,
        EngineResults,
        engines_json,
        engines_table,
        measure_engines,
    )
    from simulations.terminal import terminal

    tasks, contenders = ([n.strip() for n in text.split(",")] for text in (task, contender))
    for name in tasks:
        if name not in TASKS:
            raise unknown_name("task of this benchmark", name, TASKS)
    for name in contenders:
        kind, _, number = name.partition("-")
        if name not in CONTENDERS and not (kind in ("loop", "pfl") and number.isdigit()):
            raise unknown_name("contender", name, CONTENDERS)
    if any(name.startswith("pfl") for name in contenders) and pfl is None:
        raise UserError("pfl-research needs an environment of its own: give --pfl FOLDER")
    device_of(ExperimentConfig.resolve({"device": device}))
    progress = terminal(stderr=True, quiet=as_json)
    settings = {
        "repetitions": repetitions,
        "workers": workers,
        "allocator": allocator,
        "device": device,
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)

    def write(results: EngineResults) -> None:
        if out is not None:
            write_atomically(out, (engines_json(results, settings) + "\n").encode())

    results = measure_engines(
        tasks,
        contenders,
        repetitions=repetitions,
        allocator_for_all=allocator,
        workers=workers,
        pfl_folder=pfl,
        progress=progress.print,
        device=device,
        seconds=seconds or math.inf,
        done=write,
    )
    if not results.rows:
        first = results.failed[0]
        raise UserError(f"{first.contender} failed in '{first.task}': {printable(first.reason)}")
    if as_json:
        typer.echo(engines_json(results, settings))
    else:
        terminal().print(engines_table(results))
