"""``fedkn bench gpu``: what a GPU does for clients, in one command of a few minutes."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkn.errors import UserError, unknown_name
from simulations.commands.options import Debug, Json

__all__ = ["gpu"]


def gpu(
    *,
    part: Annotated[
        str,
        typer.Option(
            "--part",
            metavar="NAME,…",
            help="checks: same bits, no waiting, agreement with the CPU. steps: local steps of 1 "
            "to 256 clients. convolutions: of all clients' layers. networks: whole networks. "
            "rounds: whole federated rounds.",
        ),
    ] = "checks,steps,convolutions,networks,rounds",
    quick: Annotated[bool, typer.Option("--quick", help="A few cases of each part.")] = False,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1, help="Begin no case after so many seconds.")
    ] = 420.0,
    device: Annotated[str, typer.Option("--device", help="cuda or cuda:N.")] = "cuda",
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where gpu.json and gpu.md are written.")
    ] = Path("gpu"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check and time training on a GPU: one JSON file and one page, written after every case."""
    import torch

    from fedkn.config import ExperimentConfig
    from fedkn.experiment import device_of
    from simulations.benchmarks.gpu.everything import PARTS, measure_everything
    from simulations.benchmarks.gpu.page import Results
    from simulations.engines.device_queues import open_queues

    parts = [name.strip() for name in part.split(",")]
    for name in parts:
        if name not in PARTS:
            raise unknown_name("part of this benchmark", name, PARTS)
    open_queues()
    where = device_of(ExperimentConfig.resolve({"device": device}))
    if where.type != "cuda":
        raise UserError(f"--device {device}: this benchmark is of a GPU, give cuda or cuda:N")
    out.mkdir(parents=True, exist_ok=True)

    def write(results: Results) -> None:
        (out / "gpu.json").write_text(results.as_json() + "\n", encoding="utf-8")
        (out / "gpu.md").write_text(results.page(), encoding="utf-8")

    torch.set_num_threads(1)
    results = measure_everything(where, parts=parts, quick=quick, seconds=seconds, done=write)
    write(results)
    typer.echo(results.as_json() if as_json else results.page())
