"""The programs of a fleet: their command lines and environments, the same in every start."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedkn.supernode import supernode_command
from server.deployment.fleet import Device, Fleet

__all__ = ["PROXY", "SUPEREXEC", "SUPERLINK", "Program", "flower_environment"]

SUPERLINK, SUPEREXEC, PROXY = "superlink", "superexec", "proxy"


@dataclass(frozen=True)
class Program:
    """A program: a name of its own in the fleet, what to run, and what to set for it."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def superlink(fleet: Fleet) -> Program:
    """Return the SuperLink, on 127.0.0.1: its Control API knows no passwords."""
    command = (
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(fleet.superlink_port)),
        *("--ssl-ca-certfile", str(fleet.authority), "--ssl-certfile", str(fleet.certificate)),
        *("--ssl-keyfile", str(fleet.certificate_key), "--enable-supernode-auth"),
        *("--database", str(fleet.database), "--isolation", "process"),
        *("--superexec-auth-secret-file", str(fleet.superexec_secret)),
        "--disable-runtime-dependency-installation",
    )
    # It trains nothing and serves from many threads: what these free is to be given back.
    settings = flower_environment(fleet.home(SUPERLINK))
    kept = {key: value for key, value in settings.items() if not key.startswith("MALLOC_")}
    return Program(SUPERLINK, command, {**kept, "MALLOC_ARENA_MAX": "2"})


def superexec(fleet: Fleet) -> Program:
    """Return the SuperExec, which starts ServerApps: they outlive a restart of the SuperLink."""
    command = (
        *("flower-superexec", "--runtime-api-address", fleet.superlink_address),
        *("--root-certificates", str(fleet.authority)),
        *("--superexec-auth-secret-file", str(fleet.superexec_secret)),
    )
    return Program(SUPEREXEC, command, flower_environment(fleet.home(SUPEREXEC)))


def supernode(
    fleet: Fleet,
    device: Device,
    server: str,
    port: int,
    node_config: Mapping[str, str | int | float] | None = None,
) -> Program:
    """Return the SuperNode of `device` on this machine.

    Args:
        server: ``host:port`` to connect to. port: of its own Runtime API, on 127.0.0.1.
        node_config: what the ClientApp is told about the device; None: who it is, and no more.
    """
    node = node_config or {
        "partition-id": device.partition,
        "num-partitions": fleet.clients,
        "device-name": device.name,
        "state-folder": str(device.state),
    }
    command = supernode_command(
        server, ca=device.folder / "ca.crt", key=device.key, port=port, node_config=node
    )
    threads = str(node.get("threads", 1))
    environment = flower_environment(fleet.home(device.name))
    environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    return Program(device.name, command, environment)


def proxy(fleet: Fleet, nginx: str) -> Program:
    """Return the reverse proxy, the only part of the server that other machines reach."""
    command = (nginx, "-c", str(fleet.proxy_config), "-g", "daemon off;")
    return Program(PROXY, command, dict(os.environ))


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment of a Flower program whose FLWR_HOME is `home`.

    Nothing that FLWR_ variables of the caller say, nothing sent to Flower's makers, no packages
    installed at run time; one thread, memory kept (see docs/performance.md); tasks looked for
    often, which is most of a round's fixed cost that can be set.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    scripts = str(Path(sys.executable).parent)
    exempt = kept.get("NO_PROXY", kept.get("no_proxy", ""))
    local = ",".join(part for part in (exempt, "127.0.0.1", "localhost") if part)
    return {
        **kept,
        # The programs start each other by name; the environment need not be activated.
        "PATH": f"{scripts}{os.pathsep}{kept.get('PATH', '')}",
        "NO_PROXY": local,
        "no_proxy": local,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _TASK_POLL_SECONDS,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": "1000000000",
        "MALLOC_MMAP_THRESHOLD_": "1000000000",
    }


_TASK_POLL_SECONDS = "0.2"
