"""Devices whose ClientApp sends other than it trained, or later."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from server.deployment import programs
from server.deployment.fleet import Fleet
from server.deployment.ports import free_port
from server.deployment.processes import start, stop
from tests.deployment.fleets import on_path

__all__ = ["become_hostile", "write_hook"]

HOOK = '''
import os
import sys
import time
from importlib.machinery import PathFinder


def held(value):
    """Return `value`, but not while the file hold-DEVICE is beside this one."""
    hold = os.path.join(os.path.dirname(__file__), f"hold-{os.environ.get('FEDKN_PROCESS')}")
    while os.path.exists(hold):
        time.sleep(0.1)
    return value


class Hook:
    """Lets fedkn's ClientApp send other tensors than it trained."""

    def find_spec(self, name, path, target=None):
        if name != "clients.app":
            return None
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            honest = module.tensors_to_arrays
            module.tensors_to_arrays = lambda tensors: honest(
                {name: GARBAGE for name, value in tensors.items()}
            )

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Hook())
'''


def write_hook(folder: Path, sent: str) -> None:
    """Make a folder that, on PYTHONPATH, lets a ClientApp send `sent` for every `value`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK.replace("GARBAGE", sent))


def become_hostile(
    fleet: Fleet, number: int, garbage: str, folder: Path, *, server: str = "", **variables: str
) -> None:
    """Put a SuperNode in a device's place whose ClientApp sends `garbage` for every `value`.

    It goes to `server` (default: the SuperLink itself), and its environment has `variables`.
    """
    device = fleet.devices[number]
    stop(fleet, [device.name])
    write_hook(folder, garbage)
    log = fleet.log(device.name)
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    honest = programs.supernode(fleet, device, server or fleet.superlink_address, free_port())
    environment = {**honest.environment, "PYTHONPATH": on_path(folder), **variables}
    start(fleet, replace(honest, environment=environment))
