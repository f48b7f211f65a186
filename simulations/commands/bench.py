"""``fedkn bench``: every figure a ratio to a named rival, timed in turn in the same run."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedkn.errors import UserError, unknown_name
from simulations.commands.bench_engines import engines
from simulations.commands.bench_gpu import gpu
from simulations.commands.options import Debug, Json

if TYPE_CHECKING:
    import torch

    from simulations.benchmarks.results import Row

__all__ = ["bench"]

bench = typer.Typer(
    help="Measure speed and memory against named rivals, in turn, in one run.",
    no_args_is_help=True,
)
bench.command()(engines)
bench.command()(gpu)

Batches = Annotated[
    str, typer.Option("--batch-size", metavar="N,…", help="Batch sizes, separated by commas.")
]
Repetitions = Annotated[
    int, typer.Option("--repetitions", min=1, help="Measurements of every case; medians count.")
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads of PyTorch.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
ChannelsLast = Annotated[
    bool,
    typer.Option(
        "--channels-last/--contiguous",
        help="Memory layout of the maps. Training has channels last, for all our normalizers.",
    ),
]
OutFolder = Annotated[
    Path | None,
    typer.Option("--out", metavar="FOLDER", help="Write NAME.json and NAME.png there."),
]


@bench.command()
def layers(
    *,
    batch_size: Batches = "1,2,4,8,32",
    repetitions: Repetitions = 9,
    threads: Threads = 1,
    device: Device = "cpu",
    channels_last: ChannelsLast = False,
    compile_too: Annotated[
        bool, typer.Option("--compile", help="torch.compile as well: a minute for each shape.")
    ] = False,
    out: OutFolder = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time one 3x3 layer, forward and backward: KNConv2d against convolution and norm.

    Four shapes from 16 to 256 channels at every batch size; ratios are to convolution + BatchNorm.
    The unfolded KNConv is written from the paper's equations, a stand-in for the published code.
    """
    from simulations.benchmarks.layers import BASELINE, SHAPES, layer_rows

    where = _prepared(device, threads)
    sizes = _sizes(batch_size)
    measure = partial(
        layer_rows,
        repetitions=repetitions,
        device=where,
        channels_last=channels_last,
        compile_too=compile_too,
    )
    rows = _collected([partial(measure, s, size) for s in SHAPES for size in sizes], as_json)
    settings = {"batch_sizes": sizes, "repetitions": repetitions, "channels_last": channels_last}
    _show(_Benchmark("layers", BASELINE, settings), rows, out, as_json)


@bench.command()
def models(
    *,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME,…", help="resnet8-16, resnet8, knresnet18.")
    ] = "resnet8-16,resnet8,knresnet18",
    normalizer: Annotated[
        str, typer.Option("--normalizer", metavar="NAME,…", help="Beside batch and kernel.")
    ] = "none,group,layer,ws_group",
    batch_size: Batches = "2,4,8",
    repetitions: Repetitions = 7,
    threads: Threads = 1,
    device: Device = "cpu",
    channels_last: ChannelsLast = False,
    with_unfolded: Annotated[
        bool, typer.Option("--unfolded", help="The unfolded KernelNorm as well: it is slow.")
    ] = False,
    out: OutFolder = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a training step of whole networks, the same architecture with every normalizer.

    Ratios are to BatchNorm in the same architecture. `resnet8-16` is a ResNet-8 of width 16.
    """
    from fedkn import normalizers
    from simulations.benchmarks.models import BASELINE, NETWORKS, model_rows

    networks = {n.name if n.width is None else f"{n.name}-{n.width}": n for n in NETWORKS}
    chosen = [name.strip() for name in model.split(",")]
    for name in chosen:
        if name not in networks:
            raise unknown_name("model of this benchmark", name, networks)
    names = list(dict.fromkeys([BASELINE, "kernel", *filter(None, normalizer.split(","))]))
    for name in names:
        normalizers.create(name)
    where = _prepared(device, threads)
    sizes = _sizes(batch_size)
    measure = partial(
        model_rows,
        names=names,
        repetitions=repetitions,
        device=where,
        channels_last=channels_last,
        with_unfolded=with_unfolded,
    )
    rows = _collected([partial(measure, networks[n], s) for n in chosen for s in sizes], as_json)
    settings = {
        "models": chosen,
        "batch_sizes": sizes,
        "repetitions": repetitions,
        "channels_last": channels_last,
    }
    _show(_Benchmark("models", BASELINE, settings), rows, out, as_json)


@bench.command("evaluation")
def evaluation(
    *,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder with a trained model.")],
    cell: Annotated[
        str | None, typer.Option("--cell", metavar="CELL", help="Which cell, where it has several.")
    ] = None,
    draws: Annotated[
        int, typer.Option("--draws", min=1, help="Draws of the dropout in stochastic evaluation.")
    ] = 5,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate a trained kernel-normalized model in each evaluation mode, on the test images.

    Example: fedkn bench evaluation runs/NAME --cell kernel-b2-dirichlet0.3-s0
    """
    from simulations.benchmarks.evaluation_modes import evaluation_modes
    from simulations.terminal import terminal
    from simulations.whole_table import WholeTable

    results = evaluation_modes(run, cell, draws)
    if as_json:
        typer.echo(json.dumps({result.mode: result.accuracies for result in results}))
        return
    table = WholeTable("evaluation mode", "test accuracy", title=f"{run}, {cell or 'its cell'}")
    for result in results:
        table.add_row(result.mode, ", ".join(f"{100 * a:.2f}%" for a in result.accuracies))
    terminal().print(table)


@dataclass(frozen=True)
class _Benchmark:
    name: str
    baseline: str
    settings: dict[str, Any]


def _prepared(device: str, threads: int) -> torch.device:
    import torch

    from fedkn.config import ExperimentConfig
    from fedkn.experiment import device_of

    torch.set_num_threads(threads)
    return device_of(ExperimentConfig.resolve({"device": device}))


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--batch-size {text}: give whole numbers separated by commas") from None
    if min(sizes) < 1:
        raise UserError(f"--batch-size {text}: batch sizes start at 1")
    return sizes


def _collected(tasks: list[Callable[[], list[Row]]], as_json: bool) -> list[Row]:
    """Run the measurements one after another, with a bar on standard error."""
    from rich.progress import track

    from simulations.terminal import terminal

    rows: list[Row] = []
    for measure in track(tasks, "Measuring", console=terminal(stderr=True), disable=as_json):
        rows += measure()
    return rows


def _show(benchmark: _Benchmark, rows: list[Row], out: Path | None, as_json: bool) -> None:
    from simulations.benchmarks.results import as_json_text, plot, tables
    from simulations.terminal import terminal

    text = as_json_text(benchmark.name, rows, benchmark.settings)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{benchmark.name}.json").write_text(text + "\n", encoding="utf-8")
        plot(out / f"{benchmark.name}.png", rows, benchmark.baseline)
    if as_json:
        typer.echo(text)
        return
    console = terminal()
    for view in tables(rows, benchmark.baseline):
        console.print(view)
    if out is not None:
        console.print(f"Written: {out / benchmark.name}.json and .png")
