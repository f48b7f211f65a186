"""systemd units: the server's programs and a device's, started again whenever they end."""

from __future__ import annotations

import getpass
import shlex
import shutil
from string import Template

from server.deployment import programs
from server.deployment.fleet import Device, Fleet
from server.deployment.programs import PROXY, SUPEREXEC, SUPERLINK, Program

__all__ = ["device_unit", "server_units"]

# Those that differ from what systemd gives every service.
_VARIABLES = (
    "FLWR_HOME",
    "FLWR_TELEMETRY_ENABLED",
    "FLWR_DISABLE_UPDATE_CHECK",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MALLOC_ARENA_MAX",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "PATH",
)


def server_units(fleet: Fleet) -> dict[str, str]:
    """Return by file name the units of SuperLink, SuperExec and proxy."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin") or "/usr/sbin/nginx"
    each = {
        SUPERLINK: (programs.superlink(fleet), "network-online.target"),
        SUPEREXEC: (programs.superexec(fleet), "fedkn-superlink.service"),
        PROXY: (programs.proxy(fleet, nginx), "fedkn-superlink.service"),
    }
    return {
        f"fedkn-{name}.service": _unit(fleet, program, after)
        for name, (program, after) in each.items()
    }


def device_unit(fleet: Fleet, device: Device) -> str:
    """Return the unit for `device`, whose folder is expected at /etc/fedkn/device."""
    return _DEVICE.substitute(name=device.name, server=fleet.address)


def _unit(fleet: Fleet, program: Program, after: str) -> str:
    # Of a unit's Exec line: $ and % are systemd's own.
    words = (shlex.quote(word) for word in (_absolute(program), *program.command[1:]))
    line = " ".join(words).replace("%", "%%").replace("$", "$$")
    lines = [
        f'Environment="{key}={program.environment[key]}"'
        for key in _VARIABLES
        if key in program.environment and program.name != PROXY
    ]
    return _SERVER.substitute(
        name=program.name,
        after=after,
        user=getpass.getuser(),
        folder=fleet.home(program.name) if program.name != PROXY else fleet.proxy_config.parent,
        environment="\n".join(lines),
        command=line,
    )


def _absolute(program: Program) -> str:
    found = shutil.which(program.command[0], path=program.environment.get("PATH"))
    return found or program.command[0]


# A SuperExec that is ended takes the running ServerApp with it: it is given time to checkpoint.
_SERVER = Template(
    """\
[Unit]
Description=fedkn $name
Wants=network-online.target
After=$after

[Service]
User=$user
UMask=0077
WorkingDirectory=$folder
$environment
ExecStart=$command
Restart=always
RestartSec=5
TimeoutStopSec=20
NoNewPrivileges=true
PrivateTmp=true

[Install]
WantedBy=multi-user.target
"""
)

# 20 s: a SuperNode that comes back at once is refused until the server has missed it.
_DEVICE = Template(
    """\
# $name: cp -r this folder to /etc/fedkn/device, this file to /etc/systemd/system, then
#   systemctl enable --now fedkn-device
[Unit]
Description=fedkn device $name of $server
Wants=network-online.target
After=network-online.target

[Service]
User=fedkn
UMask=0077
WorkingDirectory=/etc/fedkn/device
Environment="OMP_NUM_THREADS=1"
ExecStart=/opt/fedkn/bin/fedkn device start /etc/fedkn/device
Restart=always
RestartSec=20
TimeoutStopSec=20
NoNewPrivileges=true
PrivateTmp=true

[Install]
WantedBy=multi-user.target
"""
)
