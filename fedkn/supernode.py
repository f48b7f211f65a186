"""The command line of a SuperNode: the same on a device and under ``fedkn deploy up --local``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["supernode_command"]


def supernode_command(
    server: str, *, ca: Path, key: Path, port: int, node_config: Mapping[str, str | int | float]
) -> tuple[str, ...]:
    """Return the command that becomes a SuperNode.

    Args:
        server: ``host:port`` to connect to. ca: certificate of the fleet's authority. key: the
            device's private key.
        port: of its own API, on 127.0.0.1, through which its training processes reach it.
        node_config: what the ClientApp is told about the device.
    """
    settings = " ".join(f"{name}={json.dumps(value)}" for name, value in node_config.items())
    return (
        *(sys.executable, "-P", "-m", "clients.device.supernode", "--superlink", server),
        *("--root-certificates", str(ca)),
        *("--auth-supernode-private-key", str(key)),
        *("--port", str(port), "--node-config", settings),
    )
