"""Which partition a device's key stands for: what a node says of itself is held against it.

Flower knows every node of a deployed fleet by the public key that it signs its calls with, and
tells the ServerApp. ``fedkn deploy run`` leaves beside the run's metrics which key is whose.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from flwr.serverapp import Grid

from fedkn.errors import UserError
from fedkn.files import write_atomically

__all__ = ["Identities", "read_identities", "write_identities"]

_FILE = "devices.json"


class Identities:
    """The partitions of a fleet, each bound to one public key.

    Args:
        partitions: by the SHA-256 of a public key, in hexadecimal.
    """

    def __init__(self, partitions: Mapping[str, int]) -> None:
        self._partitions = dict(partitions)

    def by_node(self, grid: Grid) -> dict[int, int | None]:
        """Return for every node online its partition; None for one whose key is nobody's."""
        return {
            node.node_id: self._partitions.get(_fingerprint(node.public_key))
            for node in grid.get_nodes()
        }


def write_identities(folder: Path, public_keys: Mapping[int, bytes]) -> None:
    """Write down for a run's server which public key, PEM as Flower keeps it, is which partition.

    Anew whenever a run is begun or gone on with: devices may have been given other keys.
    """
    partitions = {_fingerprint(key): partition for partition, key in public_keys.items()}
    write_atomically(folder / _FILE, json.dumps(partitions, indent=1).encode())


def read_identities(folder: str) -> Identities | None:
    """Return what `write_identities` wrote into a run folder; None where there is nothing.

    Raises:
        UserError: there is something else.
    """
    path = Path(folder) / _FILE
    if not folder or not path.exists():
        return None
    try:
        partitions = json.loads(path.read_text(encoding="utf-8"))
        valid = isinstance(partitions, dict) and all(
            type(partition) is int for partition in partitions.values()
        )
    except (OSError, ValueError, RecursionError):
        valid = False
    if not valid:
        raise UserError(
            f"'{path}' does not say which device is which partition: fedkn deploy run writes it "
            "anew"
        )
    return Identities(partitions)


def _fingerprint(public_key: bytes) -> str:
    return hashlib.sha256(public_key.strip()).hexdigest()
