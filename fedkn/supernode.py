"""The command line of a SuperNode: the same on a device and under ``fedkn deploy up --local``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["supernode_command", "uncarried"]


def supernode_command(
    server: str,
    *,
    ca: Path,
    key: Path,
    port: int,
    node_config: Mapping[str, str | int | float],
    certificate: Path | None = None,
) -> tuple[str, ...]:
    """Return the command that becomes a SuperNode.

    Args:
        server: ``host:port`` to connect to. ca: certificate of the fleet's authority. key: the
            device's private key.
        port: of its own API, on 127.0.0.1, through which its training processes reach it.
        node_config: what the ClientApp is told about the device.
        certificate: what it shows the server's proxy, with its key; the SuperLink asks for none.
    """
    settings = " ".join(f"{name}={_toml(value)}" for name, value in node_config.items())
    shown = ("--certificate", str(certificate)) if certificate else ()
    return (
        *(sys.executable, "-P", "-m", "clients.device.supernode", *shown, "--superlink", server),
        *("--root-certificates", str(ca)),
        *("--auth-supernode-private-key", str(key)),
        *("--port", str(port), "--node-config", settings),
    )


def uncarried(text: str) -> str:
    """Return why a SuperNode's node config cannot carry `text`, empty if it can."""
    if '"' in text or "'" in text:
        return "has a quotation mark, which Flower's node config cannot carry"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "is not UTF-8, which Flower's node config cannot carry"
    return ""


def _toml(value: str | int | float) -> str:
    """Return a value as TOML has it, which Flower reads: JSON, but for two letters.

    JSON may write a letter beyond 16 bits as two halves, which TOML takes for none, and leaves the
    control character DEL as it is, which TOML does not allow.
    """
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
