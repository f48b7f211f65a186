"""``fedkn device``: this machine as one device of a fleet."""

# ruff: noqa: PLC0415 - torch and Flower take seconds to import, and --help does not need them

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkn.errors import FedknError
from fedkn.text import printable
from simulations.commands.options import Debug, Json

if TYPE_CHECKING:
    from clients.device.finding import Finding

__all__ = ["device"]

device = typer.Typer(
    help="Take part in a fleet with this machine: check it, then start.", no_args_is_help=True
)

DeviceFile = Annotated[
    Path, typer.Argument(metavar="[DEVICE]", help="device.toml, or the folder it is in.")
]

_LONGEST = 4000
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@device.command()
def check(
    path: DeviceFile = Path(),
    *,
    config: Annotated[
        Path | None,
        typer.Option(metavar="TOML", help=r"The experiment to try; over \[experiment]."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check versions, memory, clock, server, key and data, and train for a moment.

    Exits with 1 if something fails.
    """
    from clients.device.check import check_device
    from clients.device.settings import read_device

    found = []
    for finding in check_device(read_device(path, config)):
        found.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        sys.stdout.write(json.dumps({"findings": [asdict(one) for one in found]}) + "\n")
    if any(one.status == "fail" for one in found):
        raise typer.Exit(1)


@device.command()
def start(path: DeviceFile = Path(), *, debug: Debug = False) -> None:
    """Run this device's SuperNode in the foreground, after the checks that can fail."""
    from clients.device.check import check_start
    from clients.device.settings import read_device
    from clients.device.start import become_supernode

    settings = read_device(path)
    for finding in check_start(settings):
        if finding.status == "fail":
            raise FedknError(f"{finding.name}: {finding.message}: {finding.fix}")
        _show(finding)
    become_supernode(settings)


def _show(finding: Finding) -> None:
    status = typer.style(f"{finding.status.upper():4}", fg=_COLOURS[finding.status])
    fix = f"\n{'':21}→ {printable(finding.fix, _LONGEST)}" if finding.fix else ""
    said = f"{status} {finding.name:15} {printable(finding.message, _LONGEST)}{fix}"
    # Given the stream, click does not put one of its own in its place.
    typer.echo(said, file=sys.stdout)
