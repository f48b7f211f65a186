"""Becoming the SuperNode of a device."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from clients.device.settings import Device
from fedkn.errors import UserError
from fedkn.supernode import supernode_command

__all__ = ["become_supernode", "environment"]


def environment(device: Device, present: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the SuperNode: `present`, without its ``FLWR_`` variables.

    Nothing is sent to Flower's makers, no package is installed at run time, and FLWR_HOME is in
    the device's folder. Memory that training frees is kept (docs/performance.md).
    """
    kept = {key: value for key, value in present.items() if not key.startswith("FLWR_")}
    threads = str(device.profile.threads or 1)
    return {
        **kept,
        # SuperNodes start their training processes by name, and the environment of this Python
        # need not be activated.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}",
        "FLWR_HOME": str(device.folder / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "MALLOC_TRIM_THRESHOLD_": "1000000000",
        "MALLOC_MMAP_THRESHOLD_": "1000000000",
    }


def become_supernode(device: Device) -> None:
    """Put the SuperNode in place of this process, in the device's folder. Does not return.

    Raises:
        UserError: Flower is not installed beside this Python, or the folder cannot be written.
    """
    settings = environment(device, os.environ)
    if shutil.which("flower-supernode", path=settings["PATH"]) is None:
        raise UserError("no flower-supernode beside this Python: pip install 'fedkn[device]'")
    try:
        for folder in (device.state, device.folder / "flwr"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chdir(device.folder / "flwr")
    except OSError as error:
        raise UserError(f"cannot write '{device.folder}': {error.strerror}") from None
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    sys.stdout.flush()
    command = supernode_command(
        device.server,
        ca=device.ca,
        key=device.key,
        certificate=device.certificate,
        port=port,
        node_config=device.node_config(),
    )
    os.execve(sys.executable, command, settings)
