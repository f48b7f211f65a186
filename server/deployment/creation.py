"""Making a fleet folder: everything that the server and the devices need, ready to be copied."""

from __future__ import annotations

import ipaddress
import re
import secrets
from pathlib import Path

from fedkn.errors import UserError
from fedkn.supernode import uncarried
from fedkn.text import printable
from server.deployment.certificates import (
    create_authority,
    create_signing_key,
    issue_certificate,
)
from server.deployment.containers import container_files
from server.deployment.device_config import create_device_folder
from server.deployment.fleet import Fleet, make_folder, write_secret
from server.deployment.instructions import instructions
from server.deployment.programs import PROXY, SUPEREXEC, SUPERLINK
from server.deployment.proxy import nginx_config
from server.deployment.units import device_unit, server_units

__all__ = ["create_fleet"]

_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*\.?")


def create_fleet(path: Path, clients: int, host: str, port: int) -> Fleet:
    """Make the fleet folder `path` for `clients` devices that reach the server at `host`:`port`.

    Raises UserError, having written nothing, for a folder that is not empty or settings that
    cannot be.
    """
    _check(path, clients, host, port)
    try:
        make_folder(path)
        fleet = Fleet(path.resolve(), clients, host, port, superlink_port=port + 1)
        _write(fleet)
    except OSError as error:
        raise UserError(f"cannot write the fleet folder '{path}': {error}") from None
    return fleet


def _check(path: Path, clients: int, host: str, port: int) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"'{path}' exists already: give another folder, or remove it")
    # Its devices' folders lie in it, and every file that is written here names it.
    place = str(path.resolve())
    if reason := uncarried(place) or ("" if place.isprintable() else "has unprintable letters"):
        raise UserError(f"'{printable(place)}' {reason}: give another folder")
    if clients < 1:
        raise UserError(f"--clients {clients}: a fleet has at least one device")
    if not 1024 <= port <= 65534:
        raise UserError(f"--port {port}: give one from 1024 to 65534")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if len(host) > 253 or not _HOST.fullmatch(host):
            raise UserError(
                f"--host {host}: give the name or address at which devices find the server"
            ) from None


def _write(fleet: Fleet) -> None:
    folders = ("ca", "server", "keys", "devices", "homes", "logs", "proxy", "systemd")
    for name in (*folders, "containers", "runs"):
        make_folder(fleet.path / name)
    # Services find their folders made: they may not make any.
    for made in (fleet.run_files, *(fleet.home(name) for name in (SUPERLINK, SUPEREXEC, PROXY))):
        make_folder(made)
    create_authority(fleet)
    issue_certificate(fleet)
    create_signing_key(fleet)
    write_secret(fleet.superexec_secret, secrets.token_bytes(32))
    for device in fleet.devices:
        create_device_folder(fleet, device)
        unit = device_unit(fleet, device)
        (device.folder / "fedkn-device.service").write_text(unit, encoding="utf-8")
    fleet.proxy_config.write_text(nginx_config(fleet), encoding="utf-8")
    for name, text in server_units(fleet).items():
        (fleet.path / "systemd" / name).write_text(text, encoding="utf-8")
    for name, text in container_files(fleet).items():
        (fleet.path / "containers" / name).write_text(text, encoding="utf-8")
    (fleet.path / "README.md").write_text(instructions(fleet), encoding="utf-8")
    # Last: a folder without it is no fleet.
    fleet.write()
