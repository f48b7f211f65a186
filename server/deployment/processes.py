"""Detached processes of a fleet. They are known by a mark in their environment, not by pid files.

So a pid that was given to another process is never mistaken for ours, and what a killed program
left running is found as well.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from fedkn.errors import FedknError
from server.deployment.fleet import Fleet, make_folder
from server.deployment.programs import PROXY, SUPEREXEC, Program

__all__ = ["Running", "main_processes", "running", "start", "stop"]

_FLEET_MARK, _NAME_MARK = "FEDKN_FLEET", "FEDKN_PROCESS"
_PATIENCE_SECONDS = 8.0


@dataclass(frozen=True)
class Running:
    """A process of a fleet: the program that it belongs to, its pid, start (s since 1970)."""

    name: str
    pid: int
    started: float
    leader: bool


def start(fleet: Fleet, program: Program) -> int:
    """Start `program` detached, in its own session, folder and log; return its pid.

    Raises FedknError if there is no such program.
    """
    home = make_folder(fleet.home(program.name))
    log = fleet.log(program.name)
    make_folder(log.parent)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    marks = {_FLEET_MARK: str(fleet.path), _NAME_MARK: program.name}
    try:
        process = subprocess.Popen(
            program.command,
            cwd=home,
            env={**program.environment, **marks},
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise FedknError(f"cannot start {program.command[0]}: {error.strerror}") from None
    finally:
        os.close(descriptor)
    # It is to outlive us: nobody waits for it here.
    _OURS.append(_Ours(process, fleet.path, program.name))
    return process.pid


def running(fleet: Fleet) -> list[Running]:
    """Return all processes of `fleet`, those that its programs started among them."""
    ours = {
        one.process.pid: one.name
        for one in _OURS
        if one.process.poll() is None and one.fleet == fleet.path
    }
    found = []
    for process in psutil.process_iter(["pid", "create_time"]):
        try:
            # One that has just begun has no environment yet.
            name = ours.get(process.pid) or _program_of(fleet, process)
            if name:
                leader = os.getsid(process.pid) == process.pid
                found.append(Running(name, process.pid, process.info["create_time"], leader))
        except (psutil.Error, OSError):
            continue
    return found


def main_processes(fleet: Fleet) -> dict[str, Running]:
    """Return by name the programs of `fleet` that run."""
    return {process.name: process for process in running(fleet) if process.leader}


def stop(fleet: Fleet, names: Iterable[str] | None = None) -> list[str]:
    """End the programs `names` (default: all) with all that they started; return who was there.

    They are asked to go, and killed if they have not gone after a few seconds.
    """
    chosen = None if names is None else set(names)

    def left() -> list[Running]:
        return [one for one in running(fleet) if chosen is None or one.name in chosen]

    there = left()
    _signal([one for one in there if one.leader], signal.SIGTERM)
    # A stopped process takes no signal but this one.
    _signal(there, signal.SIGCONT)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (still := left()) and time.monotonic() < deadline:
        if not any(one.leader for one in still):
            _signal(still, signal.SIGTERM)
        time.sleep(0.1)
    while still := left():
        _signal(still, signal.SIGKILL)
        time.sleep(0.05)
    return sorted({one.name for one in there})


def _program_of(fleet: Fleet, process: psutil.Process) -> str | None:
    """Return to which program of `fleet` the process belongs, None if to none."""
    try:
        environment: dict[str, str] = process.environ()
    except psutil.AccessDenied:
        # A SuperExec lets nobody see it, its owner included, unless that is root.
        if str(fleet.superexec_secret) in process.cmdline():
            return SUPEREXEC
        parent = process.parent()
        return _program_of(fleet, parent) if parent and parent.pid > 1 else None
    if environment.get(_FLEET_MARK) == str(fleet.path):
        return environment.get(_NAME_MARK)
    # nginx writes its title over its environment, but stays in the folder it was started in.
    if process.name() == "nginx" and process.cwd() == str(fleet.home(PROXY)):
        return PROXY
    return None


def _signal(processes: Sequence[Running], number: int) -> None:
    for process in processes:
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            continue


class _Ours(NamedTuple):
    process: subprocess.Popen[bytes]
    fleet: Path
    name: str


# Kept so that a process that ended is not left a zombie while this one lives.
_OURS: list[_Ours] = []
