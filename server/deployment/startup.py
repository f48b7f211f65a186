"""Bringing a fleet up: what does not run yet is started, until all that shall be online is."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta

from fedkn.errors import FedknError, UserError
from server.deployment import programs
from server.deployment.certificates import check_device_key, expiry, issue_certificate
from server.deployment.control import Control, SuperLinkAway
from server.deployment.fleet import Device, Fleet, make_folder
from server.deployment.logs import last_lines
from server.deployment.ports import check_free, free_port
from server.deployment.processes import main_processes, start, stop
from server.deployment.programs import PROXY, SUPEREXEC, SUPERLINK

__all__ = ["RENEWAL", "DevicesMissing", "bring_up", "missing_devices", "renew", "wait_for_devices"]

RENEWAL = timedelta(days=30)
"""So long before its end `bring_up` renews the server's certificate."""

Say = Callable[[str], None]
NodeConfigs = Mapping[str, Mapping[str, str | int | float]]

_START_SECONDS = 60.0
# A SuperNode that was killed is refused until the SuperLink takes it for gone, after 60 s.
_ONLINE_SECONDS = 120.0
_RESTART_SECONDS = 10.0
_POLL_SECONDS = 0.3


class DevicesMissing(FedknError):
    """Not all devices are online; the text names them."""


def bring_up(
    fleet: Fleet, *, local: bool, say: Say, node_configs: NodeConfigs | None = None
) -> None:
    """Start the server's programs and, if `local`, a SuperNode for every device on this machine.

    What already runs is left alone, so this also starts again what has died.

    Args:
        say: is told what happens, line by line.
        node_configs: by device, what its ClientApp is told about it (as `programs.supernode`).

    Raises:
        UserError: a port is taken, nginx or a local device's key is missing, a key is another.
        FedknError: a program ended at once. DevicesMissing: a local device did not come online.
    """
    _renew_in_time(fleet, say)
    if local:
        for device in fleet.devices:
            check_device_key(device.key, fleet.public_key(device))
    there = main_processes(fleet)
    if SUPERLINK not in there:
        _start_superlink(fleet)
    with Control(fleet) as control:
        _wait_for_superlink(fleet, control)
        say(f"SuperLink: {fleet.superlink_address}, TLS, node authentication on")
        if SUPEREXEC not in there:
            start(fleet, programs.superexec(fleet))
        for state in control.devices():
            if state.status == "unregistered":
                # On purpose, maybe: devices elsewhere must not wait for this one.
                if local:
                    raise UserError(_unregistered(fleet, state.device))
                say(_unregistered(fleet, state.device))
            if state.status == "unknown":
                control.register(state.device)
                say(f"{state.device.name}: key registered")
        if local:
            _start_devices(fleet, control, say, node_configs or {})
        else:
            _start_proxy(fleet, say)


def renew(fleet: Fleet, say: Say) -> None:
    """Make the server a new certificate, and start again what runs with the old one.

    Devices trust the authority, not the certificate: they notice nothing, and a run goes on.

    Raises:
        UserError: the authority's key is not here.
    """
    issue_certificate(fleet)
    say(f"server certificate renewed: it ends on {expiry(fleet):%Y-%m-%d}")
    there = main_processes(fleet)
    stop(fleet, [name for name in (PROXY, SUPERLINK) if name in there])
    if SUPERLINK in there:
        _start_superlink(fleet)
        with Control(fleet) as control:
            _wait_for_superlink(fleet, control)
        say("SuperLink: started again")
    if PROXY in there:
        _start_proxy(fleet, say)


def missing_devices(control: Control) -> list[str]:
    """Return for every device that is not online its name and state."""
    return [
        f"{state.device.name} ({state.status}{f' since {state.since[:19]}' if state.since else ''})"
        for state in control.devices()
        if state.status != "online"
    ]


def wait_for_devices(control: Control, seconds: float, say: Say) -> None:
    """Wait until all devices are online.

    Raises:
        DevicesMissing: after `seconds`, naming those that are not.
    """
    deadline = time.monotonic() + seconds
    told: list[str] = []
    while missing := missing_devices(control):
        if missing != told:
            say(f"waiting for {', '.join(missing)}")
            told = missing
        if time.monotonic() > deadline:
            raise DevicesMissing(
                f"not online after {seconds:g} s: {', '.join(missing)}. Start them, or look at "
                "their logs"
            )
        time.sleep(_POLL_SECONDS)


def _renew_in_time(fleet: Fleet, say: Say) -> None:
    left = expiry(fleet) - datetime.now(UTC)
    if left < RENEWAL and fleet.authority_key.is_file():
        renew(fleet, say)
    elif left < timedelta(0):
        raise UserError(
            f"the server's certificate ended on {expiry(fleet):%Y-%m-%d}: bring back "
            f"'{fleet.authority_key}' and try again, which renews it"
        )


def _start_superlink(fleet: Fleet) -> None:
    check_free(
        fleet.superlink_port,
        "127.0.0.1",
        f"end it, or change superlink_port in {fleet.path / 'fleet.toml'}",
    )
    start(fleet, programs.superlink(fleet))


def _wait_for_superlink(fleet: Fleet, control: Control) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            control.devices()
            return
        except SuperLinkAway:
            if SUPERLINK not in main_processes(fleet):
                raise FedknError(_ended(fleet, SUPERLINK)) from None
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)


def _start_devices(fleet: Fleet, control: Control, say: Say, node_configs: NodeConfigs) -> None:
    for device in fleet.devices:
        make_folder(device.state)
    waiting = {device.name: device for device in fleet.devices}
    # Restarts of a SuperNode that the SuperLink still takes for online.
    again: dict[str, float] = {}
    deadline = time.monotonic() + _ONLINE_SECONDS
    _start_missing(fleet, waiting.values(), node_configs)
    while waiting:
        running = main_processes(fleet)
        online = {s.device.name for s in control.devices() if s.status == "online"}
        for name in sorted(waiting.keys() & online & running.keys()):
            if _is_settled(fleet, name):
                say(f"{name}: online ({fleet.clients - len(waiting) + 1} of {fleet.clients})")
                del waiting[name]
        for name in sorted(waiting.keys() - running.keys()):
            if not _was_refused_for_now(fleet, name):
                raise FedknError(_ended(fleet, name))
            if time.monotonic() > again.get(name, 0.0):
                if name in again:
                    _start_missing(fleet, [waiting[name]], node_configs)
                else:
                    say(f"{name}: its last connection still counts as online, trying again")
                again[name] = time.monotonic() + _RESTART_SECONDS
        if waiting and time.monotonic() > deadline:
            raise DevicesMissing(
                f"not online after {_ONLINE_SECONDS:g} s: {', '.join(sorted(waiting))}. "
                f"See fedkn deploy logs {fleet.path}"
            )
        time.sleep(_POLL_SECONDS)


def _start_missing(fleet: Fleet, devices: Iterable[Device], node_configs: NodeConfigs) -> None:
    there = main_processes(fleet)
    for device in devices:
        if device.name not in there:
            # What a killed SuperNode left running would go on training for nobody.
            stop(fleet, [device.name])
            log = fleet.log(device.name)
            if log.exists():
                log.replace(log.with_suffix(".log.1"))
            server, own = fleet.superlink_address, node_configs.get(device.name)
            start(fleet, programs.supernode(fleet, device, server, free_port(), own))


def _is_settled(fleet: Fleet, name: str) -> bool:
    """Whether this very process is the one online, not a killed one before it."""
    return any("SuperNode ID:" in line for line in last_lines(fleet, name, 1000))


def _was_refused_for_now(fleet: Fleet, name: str) -> bool:
    return any(
        "could not be activated" in line.lower() or "[code:" in line
        for line in last_lines(fleet, name, 20)
    )


def _start_proxy(fleet: Fleet, say: Say) -> None:
    if PROXY in main_processes(fleet):
        say(f"proxy: {fleet.address}, Fleet API alone")
        return
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if nginx is None:
        raise UserError(
            "devices elsewhere reach the server through nginx, which is not installed here: "
            "apt-get install nginx. (On this machine alone: fedkn deploy up --local)"
        )
    check_free(fleet.port, "0.0.0.0", f"end it, or change port in {fleet.path / 'fleet.toml'}")
    start(fleet, programs.proxy(fleet, nginx))
    time.sleep(1.0)
    if PROXY not in main_processes(fleet):
        raise FedknError(_ended(fleet, PROXY))
    say(f"proxy: {fleet.address}, Fleet API alone")


def _unregistered(fleet: Fleet, device: Device) -> str:
    public = fleet.public_key(device)
    return (
        f"{device.name}'s key was unregistered, and the SuperLink takes no key twice. Give it a "
        f"new one: rm {device.key}; ssh-keygen -q -t ecdsa -b 384 -N '' -f {device.key}; "
        f"mv {device.key}.pub {public}"
    )


def _ended(fleet: Fleet, name: str) -> str:
    said = last_lines(fleet, name, 4)
    return f"{name} ended at once: {' / '.join(said) or 'it printed nothing'}"
