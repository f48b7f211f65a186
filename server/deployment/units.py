"""systemd units: the server's programs and a device's, started again whenever they end.

Each runs as a user of no other use, and sees and writes no more than it needs: ``systemd-analyze
security`` gives them at most 3.0.
"""

from __future__ import annotations

import getpass
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

import fedkn
from server.deployment import programs
from server.deployment.fleet import Device, Fleet
from server.deployment.programs import PROXY, SUPEREXEC, SUPERLINK, Program
from server.run_file import RUN_FILES
from server.signing import SIGNING_KEY

__all__ = ["device_unit", "server_units", "service_user"]

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
    "XDG_CACHE_HOME",
    RUN_FILES,
    SIGNING_KEY,
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
    return _DEVICE.substitute(name=device.name, server=fleet.address, hardened=_HARDENED)


def _unit(fleet: Fleet, program: Program, after: str) -> str:
    # Of a unit's Exec line: $ and % are systemd's own.
    words = (shlex.quote(word) for word in (_absolute(program), *program.command[1:]))
    line = " ".join(words).replace("%", "%%").replace("$", "$$")
    # A service's user has no home, where caches would be.
    environment = {**program.environment, "XDG_CACHE_HOME": str(fleet.home(program.name) / "cache")}
    lines = [
        f'Environment="{key}={environment[key]}"'
        for key in _VARIABLES
        if key in environment and program.name != PROXY
    ]
    user = service_user()
    return _SERVER.substitute(
        name=program.name,
        after=after,
        user=user,
        note=f"# useradd --system {user}; chown -R {user}: {fleet.path}\n" if user == _USER else "",
        folder=fleet.home(program.name) if program.name != PROXY else fleet.proxy_config.parent,
        environment="\n".join(lines),
        command=line,
        hardened=_HARDENED,
        more="\n".join([*_MORE[program.name], *_sees(fleet, program)]),
    )


def service_user() -> str:
    """Return as whom the services run: whoever owns the fleet, but never root."""
    user = getpass.getuser()
    return _USER if user == "root" else user


def _sees(fleet: Fleet, program: Program) -> list[str]:
    """Return what of the fleet and of users' homes a program sees and may write."""
    writes, hidden = _PARTS[program.name]
    lines = [f"ReadWritePaths={fleet.path / name}" for name in (*writes, f"homes/{program.name}")]
    # "-": should it be there. The authority's key and the devices' folders are to be elsewhere.
    hidden = ("ca/ca.key", "devices", *hidden)
    lines += [f"InaccessiblePaths=-{fleet.path / name}" for name in hidden]
    covered = [Path(name) for name in ("/home", "/root", "/run/user", "/tmp", "/var/tmp")]
    code = {Path(sys.prefix), Path(sys.base_prefix), Path(fedkn.__file__).parents[1]}
    lines += [f"BindReadOnlyPaths={path}" for path in sorted(code) if _below(path, covered)]
    if _below(fleet.path, covered):
        lines.append(f"BindReadOnlyPaths={fleet.path}")
    return lines


def _below(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _absolute(program: Program) -> str:
    found = shutil.which(program.command[0], path=program.environment.get("PATH"))
    return found or program.command[0]


_USER = "fedkn"

# What every service gives up. Not MemoryDenyWriteExecute: PyTorch makes code as it runs.
_HARDENED = """\
UMask=0077
NoNewPrivileges=true
CapabilityBoundingSet=
AmbientCapabilities=
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=true
RestrictRealtime=true
RestrictSUIDSGID=true
LockPersonality=true
PrivateTmp=true
PrivateUsers=true
PrivateDevices=true
ProtectSystem=strict
ProtectKernelTunables=true
ProtectKernelModules=true
ProtectKernelLogs=true
ProtectControlGroups=true
ProtectClock=true
ProtectHostname=true
ProtectProc=invisible
RemoveIPC=true
KeyringMode=private"""

# The SuperLink speaks to this machine alone; nginx and it make no code.
_MORE = {
    SUPERLINK: ("IPAddressDeny=any", "IPAddressAllow=localhost"),
    SUPEREXEC: (),
    PROXY: ("MemoryDenyWriteExecute=true",),
}

# Parts of the fleet folder: those that a program writes, and secrets that it does not use.
_PARTS = {
    SUPERLINK: (("server", "logs"), ("server/signing.key", "server/runs")),
    SUPEREXEC: (("runs",), ("server/server.key", "server/state.db")),
    PROXY: (("proxy", "logs"), ("server/signing.key", "server/superexec.secret", "server/runs")),
}

# A SuperExec that is ended takes the running ServerApp with it: it is given time to checkpoint.
_SERVER = Template(
    """\
$note\
[Unit]
Description=fedkn $name
Wants=network-online.target
After=$after

[Service]
User=$user
WorkingDirectory=$folder
$environment
ExecStart=$command
Restart=always
RestartSec=5
TimeoutStopSec=20
$hardened
ProtectHome=tmpfs
$more

[Install]
WantedBy=multi-user.target
"""
)

# 20 s: a SuperNode that comes back at once is refused until the server has missed it.
_DEVICE = Template(
    """\
# $name: cp -r this folder to /etc/fedkn/device, this file to /etc/systemd/system, then
#   useradd --system fedkn; chown -R fedkn: /etc/fedkn/device
#   systemctl enable --now fedkn-device
# To train on a GPU: PrivateDevices=false.
[Unit]
Description=fedkn device $name of $server
Wants=network-online.target
After=network-online.target

[Service]
User=fedkn
WorkingDirectory=/etc/fedkn/device
Environment="OMP_NUM_THREADS=1"
Environment="XDG_CACHE_HOME=/etc/fedkn/device/cache"
ExecStart=/opt/fedkn/bin/fedkn device start /etc/fedkn/device
Restart=always
RestartSec=20
TimeoutStopSec=20
$hardened
ProtectHome=read-only
ReadWritePaths=/etc/fedkn/device

[Install]
WantedBy=multi-user.target
"""
)
