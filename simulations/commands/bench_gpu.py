"""``fedkn bench gpu``: what a GPU does for clients, in one command of a few minutes."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkn.errors import UserError, unknown_name
from fedkn.files import write_atomically
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
            "to 256 clients. rounds: whole federated rounds. networks: whole networks. layers: "
            "single ones, and how near their kernels come to a copy. convolutions: of all clients' "
            "layers. tests: those of a checkout that need a GPU.",
        ),
    ] = "checks,steps,rounds,networks,layers,convolutions,tests",
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds", min=1, help="It ends by then; the most important cases come first."
        ),
    ] = 420.0,
    device: Annotated[str, typer.Option("--device", help="cuda or cuda:N.")] = "cuda",
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where gpu.json and gpu.md are written.")
    ] = Path("gpu"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check and time training on a GPU: one JSON file and one page, written after every case."""
    from fedkn.config import ExperimentConfig
    from fedkn.experiment import device_of
    from simulations.benchmarks.gpu.cases import PARTS
    from simulations.benchmarks.gpu.device import Gpu
    from simulations.benchmarks.gpu.everything import measure_everything
    from simulations.benchmarks.gpu.page import Results

    parts = [name.strip() for name in part.split(",")]
    for name in parts:
        if name not in PARTS:
            raise unknown_name("part of this benchmark", name, PARTS)
    where = device_of(ExperimentConfig.resolve({"device": device}))
    if where.type != "cuda":
        raise UserError(f"--device {device}: this benchmark is of a GPU, give cuda or cuda:N")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into '{out}': {error.strerror}") from None

    def write(results: Results) -> None:
        write_atomically(out / "gpu.json", (results.as_json() + "\n").encode())
        write_atomically(out / "gpu.md", results.page().encode())

    results = measure_everything(Gpu(str(where)), parts=parts, seconds=seconds, done=write)
    typer.echo(results.as_json() if as_json else results.page())
