"""``fedkn deploy``: a fleet of real devices, or of processes that stand in for them."""

# ruff: noqa: PLC0415 - torch and Flower take seconds to import, and --help does not need them

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from simulations.commands.deploy_run import FleetFolder, follow, run, stop
from simulations.commands.options import Debug, Json
from simulations.terminal import terminal
from simulations.whole_table import WholeTable

if TYPE_CHECKING:
    from server.deployment.fleet import Fleet

__all__ = ["deploy"]

deploy = typer.Typer(
    help="Train on real devices, over TLS: a fleet folder, its server, its devices.",
    no_args_is_help=True,
)
for _command in (run, follow, stop):
    deploy.command()(_command)


@deploy.command()
def init(
    fleet: FleetFolder,
    *,
    clients: Annotated[int, typer.Option(metavar="N", help="Number of devices.")] = 3,
    host: Annotated[
        str, typer.Option(metavar="NAME", help="Name or address at which devices find the server.")
    ] = "localhost",
    port: Annotated[
        int, typer.Option(metavar="N", help="Its port; N + 1 is the SuperLink's, on 127.0.0.1.")
    ] = 8443,
    debug: Debug = False,
) -> None:
    """Make a fleet folder: certificates, keys, a folder for every device, services, README.

    Example:

      fedkn deploy init fleet/ --clients 3 --host server.local
    """
    from server.deployment.creation import create_fleet

    made = create_fleet(fleet, clients, host, port)
    console = Console()
    _say(console, f"fleet of {clients} in {made.path}; devices reach it at {made.address}")
    _say(console, f"Next:  fedkn deploy up {fleet} --local   (or see {fleet / 'README.md'})")


@deploy.command()
def up(
    fleet: FleetFolder,
    *,
    local: Annotated[
        bool, typer.Option("--local", help="Run the devices on this machine as well.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Start what does not run yet: the server, and with --local a SuperNode for every device."""
    from server.deployment.fleet import Fleet
    from server.deployment.startup import bring_up

    console, opened = Console(), Fleet.open(fleet)
    try:
        bring_up(
            opened,
            local=local,
            say=lambda text: _say(console, text),
            node_configs=_node_configs(opened) if local else None,
        )
    except KeyboardInterrupt:
        _say(console, f"stopped; what was started runs: up again, or fedkn deploy down {fleet}")
        raise typer.Exit(130) from None
    _say(console, f"Next:  fedkn deploy run {fleet}")


@deploy.command()
def renew(fleet: FleetFolder, *, debug: Debug = False) -> None:
    """Make the server a new certificate and let it use it; devices and runs go on.

    Needs ca/ca.key. Services of systemd are to be started again by hand:
    systemctl restart fedkn-superlink fedkn-proxy.
    """
    from server.deployment.fleet import Fleet
    from server.deployment.startup import renew

    console = Console()
    renew(Fleet.open(fleet), say=lambda text: _say(console, text))


@deploy.command()
def status(fleet: FleetFolder, *, as_json: Json = False, debug: Debug = False) -> None:
    """Show the fleet's processes, devices and last runs."""
    from server.deployment.status import Status, fleet_status

    state: Status = fleet_status(fleet)
    if as_json:
        sys.stdout.write(json.dumps(state.as_json()) + "\n")
        raise typer.Exit(0 if state.answers else 1)
    console = terminal()
    for title, columns, rows in state.tables():
        table = WholeTable(title=title, title_justify="left", box=None, header_style="dim")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    _say(console, state.note)
    if not state.answers:
        raise typer.Exit(1)


@deploy.command()
def logs(
    fleet: FleetFolder,
    *,
    process: Annotated[
        str, typer.Option(metavar="NAME", help="superlink, superexec, proxy, refusals or a device.")
    ] = "",
    lines: Annotated[int, typer.Option(metavar="N", min=0, help="Last lines of each.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until Ctrl-C.")] = False,
    debug: Debug = False,
) -> None:
    """Show what the fleet's processes printed."""
    from server.deployment.fleet import Fleet
    from server.deployment.logs import follow_logs, last_lines, log_names

    opened = Fleet.open(fleet)
    names = log_names(opened, process)
    width = max(map(len, names), default=0)
    for name in names:
        for line in last_lines(opened, name, lines):
            typer.echo(f"{name:{width}}  {line}", file=sys.stdout)
    if follow:
        for name, line in follow_logs(opened, names):
            typer.echo(f"{name:{width}}  {line}", file=sys.stdout)


@deploy.command()
def down(fleet: FleetFolder, *, debug: Debug = False) -> None:
    """End every process of the fleet on this machine; keys, state and results stay."""
    from server.deployment.fleet import Fleet
    from server.deployment.processes import stop

    ended = stop(Fleet.open(fleet))
    typer.echo(f"ended: {', '.join(ended)}" if ended else "nothing was running", file=sys.stdout)


def _node_configs(fleet: Fleet) -> dict[str, dict[str, str | int | float]]:
    """Return what every device.toml says of data and limits of the device's own."""
    from clients.device.settings import read_device

    return {device.name: read_device(device.folder).node_config() for device in fleet.devices}


def _say(console: Console, text: str) -> None:
    # Paths must stay whole, to be copied.
    console.print(text, highlight=False, soft_wrap=True, markup=False)
