"""The options that several commands share, and what configuration keys they set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedkn.errors import UserError
from fedkn.text import printable
from simulations.api.settings import refuse_set_by_runs
from simulations.commands import choices

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
        help=f"Of {choices.NORMALIZERS}, {choices.OWN}.",
        show_default="kernel,group,ws_group,batch,none",
    ),
]
BatchSizes = Annotated[
    str | None,
    typer.Option(
        "--batch-size",
        metavar="N,…",
        rich_help_panel=_AXES,
        help="Local batch sizes, 1 or more.",
        show_default="2,8",
    ),
]
LearningRates = Annotated[
    str | None,
    typer.Option(
        "--learning-rate",
        metavar="X,…",
        rich_help_panel=_AXES,
        help="Rates to search on validation images; a single one is used as it is.",
        show_default="0.01,0.03,0.1,0.3",
    ),
]
Partitions = Annotated[
    str | None,
    typer.Option(
        "--partition",
        metavar="SPEC,…",
        rich_help_panel=_AXES,
        help=f"Of {choices.PARTITIONS}, with settings of partition.*, such as "
        "dirichlet:alpha=0.3, shards:shards_per_client=2, iid:clients=10.",
        show_default="partition.scheme: dirichlet",
    ),
]
AxisValues = Annotated[
    list[str] | None,
    typer.Option(
        "--axis",
        metavar="KEY=VALUE,…",
        rich_help_panel=_AXES,
        help="Vary any other setting of docs/configuration.md too, repeatable: as "
        "train.momentum=0,0.9, model.options.depth=1,2 or strategy.name=fedavg,scaffold, of "
        f"{choices.STRATEGIES}.",
        show_default="none",
    ),
]
Seeds = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=_AXES,
        help="Repetitions, each with its own seed; tests need 3, 1000 at most.",
        show_default="5",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N", rich_help_panel=_RUN, help="The (first) seed, 0 or more.", show_default="0"
    ),
]
SourceName = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="NAME",
        rich_help_panel=_DATA,
        help=f"Of {choices.SOURCES} (digits are embedded), {choices.OWN}.",
        show_default="digits",
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        rich_help_panel=_DATA,
        help="Folder, or .npz file, that holds the data.",
        show_default="none, which digits need",
    ),
]
Download = Annotated[
    bool,
    typer.Option("--download", rich_help_panel=_DATA, help="Fetch missing data into --root."),
]
Clients = Annotated[
    int | None,
    typer.Option(metavar="N", rich_help_panel=_DATA, help="Number of clients.", show_default="20"),
]
Cohort = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=_DATA,
        help="Clients in a round, no more than there are.",
        show_default="5",
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        metavar="N", rich_help_panel=_RUN, help="Federated rounds, 1 or more.", show_default="15"
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=_RUN,
        help=f"Of {choices.MODELS}, {choices.OWN}.",
        show_default="resnet8",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=_RUN,
        help="Cells that run at once.",
        show_default="one per core",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel=_RUN,
        help="Any key of docs/configuration.md, repeatable: as train.momentum=0.9, task.name=… of "
        f"{choices.TASKS}, or strategy.name=… of {choices.STRATEGIES}.",
        show_default="what the file says, else as documented",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=_OUTPUT,
        help="Run folder runs/NAME.",
        show_default="command and time",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        rich_help_panel=_OUTPUT,
        help="Run folder, anywhere.",
        show_default="runs/NAME",
    ),
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
