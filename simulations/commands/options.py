"""The options that several commands share, and what configuration keys they set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedkn.errors import UserError
from fedkn.text import printable
from simulations.api.settings import refuse_set_by_runs

__all__ = [
    "AxisValues",
    "BatchSizes",
    "Clients",
    "Cohort",
    "Debug",
    "Download",
    "Json",
    "LearningRates",
    "Model",
    "Name",
    "Normalizers",
    "Out",
    "Partitions",
    "Root",
    "Rounds",
    "Seed",
    "Seeds",
    "Settings",
    "SourceName",
    "Workers",
    "axes_given",
    "given",
]

_AXES, _DATA, _RUN, _OUTPUT = "The comparison", "Data and clients", "The run", "Output"

Normalizers = Annotated[
    str | None,
    typer.Option(
        "--normalizer",
        metavar="NAME,…",
        rich_help_panel=_AXES,
        help="Of none, batch, group, layer, instance, ws_group, kernel, …",
    ),
]
BatchSizes = Annotated[
    str | None,
    typer.Option("--batch-size", metavar="N,…", rich_help_panel=_AXES, help="Local batch sizes."),
]
LearningRates = Annotated[
    str | None,
    typer.Option(
        "--learning-rate",
        metavar="X,…",
        rich_help_panel=_AXES,
        help="Rates to search on validation images; a single one is used as it is.",
    ),
]
Partitions = Annotated[
    str | None,
    typer.Option(
        "--partition",
        metavar="SPEC,…",
        rich_help_panel=_AXES,
        help="Such as iid, dirichlet:alpha=0.3, shards:shards_per_client=2, quantity:sigma=1.",
    ),
]
AxisValues = Annotated[
    list[str] | None,
    typer.Option(
        "--axis",
        metavar="KEY=VALUE,…",
        rich_help_panel=_AXES,
        help="Vary any other setting too, as strategy.name=fedavg,scaffold; repeatable.",
    ),
]
Seeds = Annotated[
    int | None,
    typer.Option(metavar="N", rich_help_panel=_AXES, help="Repetitions, each with its own seed."),
]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", rich_help_panel=_RUN, help="The (first) seed."),
]
SourceName = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="NAME",
        rich_help_panel=_DATA,
        help="digits (embedded), mnist, cifar10, image_folder, arrays, …",
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH", rich_help_panel=_DATA, help="Folder, or .npz file, that holds the data."
    ),
]
Download = Annotated[
    bool,
    typer.Option("--download", rich_help_panel=_DATA, help="Fetch missing data into --root."),
]
Clients = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=_DATA, help="Number of clients.")
]
Cohort = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=_DATA, help="Clients in a round.")
]
Rounds = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=_RUN, help="Federated rounds.")
]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", rich_help_panel=_RUN, help="resnet8, knresnet18, …")
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N", rich_help_panel=_RUN, help="Cells that run at once (default: one per core)."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel=_RUN,
        help="Any configuration key, as train.momentum=0.9; repeatable.",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", rich_help_panel=_OUTPUT, help="Run folder runs/NAME (default: by time)."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="PATH", rich_help_panel=_OUTPUT, help="Run folder, anywhere."),
]
Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=_OUTPUT, help="Print one JSON object, nothing else."),
]
# simulations.cli.main looks for it by itself, before there is a command.
Debug = Annotated[
    bool,
    typer.Option("--debug", rich_help_panel=_OUTPUT, help="Show tracebacks and Flower's log."),
]


def given(settings: list[str] | None, **flags: Any) -> dict[str, Any]:
    """Return the dotted keys that were given: `flags` that are not None, then ``--set`` ones.

    In a keyword ``__`` stands for the dot. Raises UserError for a setting without ``=``, and for
    what every run sets itself.
    """
    keys = {key.replace("__", "."): value for key, value in flags.items() if value is not None}
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        shown = printable(setting, 80)
        if not equals:
            raise UserError(f"--set {shown}: write KEY=VALUE, as in --set train.momentum=0.9")
        refuse_set_by_runs(key.strip())
        keys[key.strip()] = value.strip()
    return keys


def axes_given(axes: list[str] | None) -> dict[str, str]:
    """Return the dotted keys that ``--axis`` options set.

    Raises UserError for one without ``=``, and for one that is given twice.
    """
    keys: dict[str, str] = {}
    for axis in axes or ():
        key, equals, values = axis.partition("=")
        shown = printable(axis, 80)
        if not equals:
            raise UserError(
                f"--axis {shown}: write KEY=VALUE,VALUE, as in --axis strategy.name=fedavg,scaffold"
            )
        if (name := f"compare.axes.{key.strip()}") in keys:
            raise UserError(
                f"--axis {shown}: {key.strip()} is given twice; give all values at once"
            )
        keys[name] = values
    return keys
