"""What a fleet is doing: its processes here, its devices, its last runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from server.deployment.certificates import expiry
from server.deployment.control import Control, DeviceState, RunState, SuperLinkAway
from server.deployment.disk import disk_use
from server.deployment.fleet import Fleet
from server.deployment.processes import Running, main_processes
from server.deployment.programs import SUPEREXEC, SUPERLINK
from server.deployment.startup import RENEWAL

__all__ = ["Status", "fleet_status"]

_SHOWN_RUNS = 5


@dataclass(frozen=True)
class Status:
    """The state of a fleet; without a SuperLink that `answers` there are no devices and runs."""

    fleet: Fleet
    processes: dict[str, Running]
    devices: list[DeviceState]
    runs: list[RunState]
    answers: bool

    def tables(self) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """Yield title, columns and rows of every table that has any."""
        names = dict.fromkeys((SUPERLINK, SUPEREXEC, *self.processes))
        rows: list[tuple[str, ...]] = []
        for name in names:
            process = self.processes.get(name)
            if process is None:
                rows.append((name, "not running", "", ""))
            else:
                age = _duration(time.time() - process.started)
                rows.append((name, "running", str(process.pid), age))
        yield "Processes here", ("name", "state", "pid", "for"), rows
        if self.devices:
            states = [
                (
                    s.device.name,
                    s.status,
                    s.since[:19],
                    "" if s.heartbeat is None else f"{s.heartbeat:.0f} s ago",
                )
                for s in self.devices
            ]
            columns = ("name", "state", "since (UTC)", "last heartbeat")
            yield "Devices", columns, list(states)
        if self.runs:
            shown = [
                (
                    Path(run.folder).name or "?",
                    run.outcome or run.status,
                    run.pending_at[:19],
                    run.finished_at[:19],
                )
                for run in self.runs[:_SHOWN_RUNS]
            ]
            yield "Last runs", ("run", "state", "begun (UTC)", "ended (UTC)"), list(shown)
        yield "On disk", ("what", "MiB"), _disk_rows(self.fleet)

    def as_json(self) -> dict[str, Any]:
        """Return the same as values of JSON; docs/deployment.md names the keys."""
        now = time.time()
        names = dict.fromkeys((SUPERLINK, SUPEREXEC, *self.processes))
        return {
            "fleet": str(self.fleet.path),
            "answers": self.answers,
            "certificate_ends": expiry(self.fleet).isoformat(timespec="seconds"),
            "processes": [
                {"name": name, "pid": process.pid, "seconds": round(now - process.started, 1)}
                if (process := self.processes.get(name))
                else {"name": name, "pid": None, "seconds": None}
                for name in names
            ],
            "devices": [
                {
                    "name": state.device.name,
                    "partition": state.device.partition,
                    "state": state.status,
                    "since": state.since or None,
                    "heartbeat_seconds": (
                        None if state.heartbeat is None else round(state.heartbeat, 1)
                    ),
                }
                for state in self.devices
            ],
            "runs": [
                {
                    "name": Path(run.folder).name,
                    "state": run.outcome or run.status,
                    "begun": run.pending_at or None,
                    "ended": run.finished_at or None,
                }
                for run in self.runs
            ],
        }

    @property
    def note(self) -> str:
        """One line: whether the server answers, and until when its certificate lasts."""
        if not self.answers:
            return (
                f"The SuperLink does not answer: fedkn deploy up {self.fleet.path}; "
                f"{_certificate(self.fleet)}"
            )
        online = sum(state.status == "online" for state in self.devices)
        silent = [state.device.name for state in self.devices if state.status == "silent"]
        doubt = f", {', '.join(silent)} silent" if silent else ""
        return f"{online} of {self.fleet.clients} devices online{doubt}; {_certificate(self.fleet)}"


def fleet_status(path: Path) -> Status:
    """Return the state of the fleet in the folder `path`. Raises UserError if there is none."""
    fleet = Fleet.open(path)
    processes = main_processes(fleet)
    try:
        with Control(fleet) as control:
            return Status(fleet, processes, control.devices(), control.runs(), True)
    except SuperLinkAway:
        return Status(fleet, processes, [], [], False)


def _disk_rows(fleet: Fleet) -> list[tuple[str, ...]]:
    return [(name, f"{size / 2**20:.1f}") for name, size in disk_use(fleet)]


def _certificate(fleet: Fleet) -> str:
    ends = expiry(fleet)
    left = ends - datetime.now(UTC)
    if left < timedelta(0):
        return f"certificate ENDED on {ends:%Y-%m-%d}: fedkn deploy renew {fleet.path}"
    if left < RENEWAL:
        return f"certificate ends in {left.days} days: fedkn deploy renew {fleet.path}"
    return f"certificate until {ends:%Y-%m-%d}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
