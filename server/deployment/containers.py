"""Dockerfiles and a compose file: the server and one device as containers."""

from __future__ import annotations

import sys
from string import Template

from server.deployment import programs
from server.deployment.fleet import Fleet
from server.deployment.programs import PROXY, SUPEREXEC, SUPERLINK, Program

__all__ = ["container_files"]


def container_files(fleet: Fleet) -> dict[str, str]:
    """Return by file name what builds and starts the containers.

    None of it has been run where fedkn is developed: there is no Docker engine.
    """
    return {
        "Dockerfile.server": _DOCKERFILE.substitute(note=_NOTE, kind="server"),
        "Dockerfile.device": _DOCKERFILE.substitute(note=_NOTE, kind="device"),
        "compose.yaml": _COMPOSE.substitute(
            note=_NOTE,
            hardened=_HARDENED,
            superlink=_service(fleet, programs.superlink(fleet)),
            superexec=_service(fleet, programs.superexec(fleet)),
            proxy=_mounts(fleet, PROXY),
            fleet=fleet.path,
        ),
        "compose.device.yaml": _COMPOSE_DEVICE.substitute(note=_NOTE, hardened=_HARDENED),
    }


def _service(fleet: Fleet, program: Program) -> str:
    """Return of a service what it sees, its environment and its command."""
    python = ["python" if word == sys.executable else word for word in program.command]
    words = "".join(f"      - '{word}'\n" for word in python)
    told = ("FLWR_", "FEDKN_", "OMP_", "MKL_", "MALLOC_")
    variables = "".join(
        f"      {key}: '{value}'\n"
        for key, value in program.environment.items()
        if key.startswith(told)
    )
    cache = fleet.home(program.name) / "cache"
    return f"""\
{_mounts(fleet, program.name)}    environment:
      XDG_CACHE_HOME: '{cache}'
{variables}    command:
{words}"""


def _mounts(fleet: Fleet, name: str) -> str:
    # Under its own path, so that what is named in commands and nginx.conf is found. A folder that
    # is mounted does not bring along the files that are put over it.
    lines = [f"{fleet.path / part}:{fleet.path / part}{mode}" for part, mode in _MOUNTS[name]]
    lines += [f"/dev/null:{fleet.path / part}:ro" for part in _COVERED.get(name, ())]
    return "    volumes:\n" + "".join(f"      - '{line}'\n" for line in lines)


# What a service sees of the fleet folder: never the authority's key, nor a device's.
_MOUNTS = {
    SUPERLINK: (("ca/ca.crt", ":ro"), ("server", ""), ("homes/superlink", ""), ("logs", "")),
    SUPEREXEC: (
        ("ca/ca.crt", ":ro"),
        ("server/superexec.secret", ":ro"),
        ("server/signing.key", ":ro"),
        ("server/runs", ":ro"),
        ("homes/superexec", ""),
        ("runs", ""),
    ),
    PROXY: (
        ("ca/ca.crt", ":ro"),
        ("server/server.crt", ":ro"),
        ("server/server.key", ":ro"),
        ("proxy", ""),
        ("logs", ""),
    ),
}
_COVERED = {SUPERLINK: ("server/signing.key",)}

_NOTE = "Written by fedkn deploy init. NOT RUN where fedkn is developed: there is no Docker engine."

# Every version and its hash: requirements-server.txt and -device.txt of fedkn's sources.
_DOCKERFILE = Template(
    """\
# $note
# Beside this file: fedkn's wheel (python -m build) and requirements-$kind.txt of its sources.
FROM python:3.11-slim
RUN useradd --uid 1000 --create-home fedkn
COPY requirements-$kind.txt fedkn-*.whl /tmp/
RUN pip install --no-cache-dir --require-hashes -r /tmp/requirements-$kind.txt \\
    && pip install --no-cache-dir --no-deps /tmp/fedkn-*.whl && rm /tmp/fedkn-*.whl
USER fedkn
"""
)

_HARDENED = """\
    user: '1000:1000'
    restart: always
    read_only: true
    tmpfs: [/tmp]
    cap_drop: [ALL]
    security_opt: ['no-new-privileges:true']
    pids_limit: 512
"""

# All on the host's network: the SuperLink must stay on 127.0.0.1, where nginx finds it.
_COMPOSE = Template(
    """\
# $note
# The fleet folder must belong to the containers' user (uid 1000): chown -R 1000 $fleet
# After fedkn deploy renew: docker compose restart superlink proxy
services:
  superlink:
    image: fedkn-server
    build: {context: ., dockerfile: Dockerfile.server}
    network_mode: host
$hardened\
$superlink\
  superexec:
    image: fedkn-server
    build: {context: ., dockerfile: Dockerfile.server}
    network_mode: host
$hardened\
$superexec\
  proxy:
    image: nginx:1.28
    network_mode: host
$hardened\
$proxy\
    command: ['nginx', '-c', '$fleet/proxy/nginx.conf', '-g', 'daemon off;']
"""
)

_COMPOSE_DEVICE = Template(
    """\
# $note
# On a device: this file, Dockerfile.device and what it names beside the device's folder, which must
# belong to the container's user (uid 1000): chown -R 1000 device
services:
  device:
    image: fedkn-device
    build: {context: ., dockerfile: Dockerfile.device}
$hardened\
    volumes: ['./device:/etc/fedkn/device']
    environment: {OMP_NUM_THREADS: '1', XDG_CACHE_HOME: /etc/fedkn/device/cache}
    command: ['fedkn', 'device', 'start', '/etc/fedkn/device']
"""
)
