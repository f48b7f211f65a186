"""A soak: a fleet on this machine, many rounds, and devices killed and restarted all along.

``make soak``, or ``python -m tests.deployment.soak FOLDER``: not collected by pytest, because it
takes most of an hour. It writes soak.json and soak.png into FOLDER and fails where a round is lost,
where an update is missing that no event explains, or where the memory of a process grows.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from server.deployment.fleet import Fleet
from server.deployment.processes import stop
from server.deployment.programs import SUPEREXEC, SUPERLINK
from tests.deployment.fleets import Run, a_fleet, fedkn, kill
from tests.deployment.soak_memory import (
    CLIENT_APP,
    FITTED_ROUNDS,
    WARM_UP_ROUNDS,
    Growth,
    Memory,
    draw,
)

ROUNDS_PER_EVENT = 5
# Of its median resident memory a process may grow so much in a hundred rounds.
ALLOWED_GROWTH = 0.10
# A shorter run fits no process: one that lived through all of it has too few rounds.
FITTED_FROM = WARM_UP_ROUNDS + FITTED_ROUNDS + 1
SAMPLE_SECONDS = 5.0
# Between what happens and when it is seen here.
GRACE_SECONDS = 3.0
EXPERIMENT = {
    "train__local_steps": 10,
    "evaluation__every": 10,
    "server__join_timeout": 90,
    "server__round_timeout": 150,
}
KEPT = ("round", "seconds", "updates", "train_seconds", "failed", "refused", "state_lost")


@dataclass
class Event:
    """Something done to a device: what, to which, and from when until it was online again (s).

    `problem` is empty when it came back.
    """

    kind: str
    device: int
    after_round: int
    began: float
    ended: float = float("inf")
    problem: str = "it was not started again"


class Unrest:
    """Kills or restarts one device, drawn from the seed, in every few rounds."""

    def __init__(self, fleet: Fleet, rounds: int, seed: int, began: float) -> None:
        self._fleet = fleet
        self._draw = random.Random(seed)
        self._began = began
        blocks = range(0, rounds, ROUNDS_PER_EVENT)
        self._due = [block + self._draw.randrange(ROUNDS_PER_EVENT) for block in blocks]
        self._thread: threading.Thread | None = None
        self.events: list[Event] = []

    def tick(self, rounds: int, round_seconds: float) -> None:
        """Begin the next event if it is due, now that so many rounds have ended."""
        busy = self._thread is not None and self._thread.is_alive()
        if self._due and rounds >= self._due[0] and not busy:
            del self._due[0]
            delay = self._draw.uniform(0, round_seconds)
            kind = self._draw.choice(["kill", "restart"])
            device = self._draw.randrange(self._fleet.clients)
            self._thread = threading.Thread(target=self._strike, args=(kind, device, rounds, delay))
            self._thread.start()

    def finish(self) -> None:
        """Wait for the last device to be back."""
        if self._thread:
            self._thread.join()

    def _strike(self, kind: str, device: int, rounds: int, delay: float) -> None:
        time.sleep(delay)
        name = self._fleet.devices[device].name
        event = Event(kind, device, rounds, time.monotonic() - self._began)
        self.events.append(event)
        if kind == "kill":
            kill(self._fleet, name, signal.SIGKILL)
        else:
            stop(self._fleet, [name])
        done = fedkn("up", str(self._fleet.path), "--local", timeout=400)
        event.ended = time.monotonic() - self._began
        event.problem = done.stderr if done.returncode else ""
        say(f"{event.began:6.0f} s: {kind} {name}, back after {event.ended - event.began:.0f} s")


def soak(fleet: Fleet, rounds: int, seed: int) -> dict[str, Any]:
    """Run the soak on a fleet that is not up yet; return what was seen, as JSON takes it."""
    done = fedkn("up", str(fleet.path), "--local", timeout=400)
    assert done.returncode == 0, done.stderr
    began = time.monotonic()
    memory, unrest = Memory(fleet), Unrest(fleet, rounds, seed, began)
    ended: list[float] = []
    next_sample = 0.0
    with Run(fleet, "soak", rounds=rounds, cohort=fleet.clients, **EXPERIMENT) as run:
        while run.going():
            for line in run.lines("round")[len(ended) :]:
                ended.append(time.monotonic() - began)
                say(f"{ended[-1]:6.0f} s: round {line['round']}, {line['updates']} updates")
            unrest.tick(len(ended), ended[-1] / len(ended) if ended else 0.0)
            if time.monotonic() >= next_sample:
                memory.sample(len(ended))
                next_sample = time.monotonic() + SAMPLE_SECONDS
            time.sleep(0.5)
        code, output = run.end()
    unrest.finish()
    lines = run.lines("round")
    ended += [time.monotonic() - began] * (len(lines) - len(ended))
    return {
        "devices": fleet.clients,
        "seed": seed,
        "asked_rounds": rounds,
        "exit_code": code,
        "output": output[-2000:],
        "rounds": [
            {key: line[key] for key in KEPT} | {"ended": end}
            for line, end in zip(lines, ended, strict=True)
        ],
        "events": [asdict(event) for event in unrest.events],
        "growths": [asdict(growth) for growth in memory.growths()],
        "database_bytes": sum(one.stat().st_size for one in fleet.database.parent.glob("state.*")),
        "log_bytes": sum(one.stat().st_size for one in fleet.log("any").parent.iterdir()),
        "memory": memory.table(),
    }


def problems(seen: dict[str, Any]) -> list[str]:
    """Return what is wrong with a soak, one line each; nothing if it passed."""
    found = []
    if seen["exit_code"] != 0:
        found.append(f"the run ended with {seen['exit_code']}: {seen['output']}")
    if (ended := len(seen["rounds"])) != seen["asked_rounds"]:
        found.append(f"{ended} of {seen['asked_rounds']} rounds ended")
    found += [f"{event} did not come back" for event in seen["events"] if event["problem"]]
    for line in seen["rounds"]:
        number = line["round"]
        if not line["updates"]:
            found.append(f"round {number} is lost: it has no update")
        found += [f"round {number}: refused {loss}" for loss in line["refused"]]
        found += [
            f"round {number}: no update of {loss['client']} ({loss['reason']}), and no event"
            for loss in line["failed"]
            if not explaining(line, loss["client"], seen["events"])
        ]
        if line["updates"] + len(line["failed"]) + len(line["refused"]) != seen["devices"]:
            found.append(f"round {number}: {line['updates']} updates, not all others are named")
    for growth in (Growth(**fields) for fields in seen["growths"]):
        if growth.per_100_rounds > ALLOWED_GROWTH:
            found.append(f"memory grows: {growth}")
    if not seen["growths"] and seen["asked_rounds"] >= FITTED_FROM:
        found.append("no process lived long enough for its memory to be fitted")
    return found


def explaining(
    line: dict[str, Any], client: int, events: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the events that cost `client` its update in a round: they overlap it in time."""
    begin, end = line["ended"] - line["seconds"], line["ended"]
    return [
        event
        for event in events
        if event["device"] == client
        and event["began"] <= end + GRACE_SECONDS
        and event["ended"] >= begin - GRACE_SECONDS
    ]


def summary(seen: dict[str, Any]) -> str:
    """Return the figures that docs/deployment.md gives."""
    rounds, events = seen["rounds"], seen["events"]
    kinds = Counter(event["kind"] for event in events)
    missed = sum(len(line["failed"]) for line in rounds)
    undisturbed = [line["seconds"] for line in rounds if not line["failed"]]
    rows = [
        f"{len(rounds)} rounds in {rounds[-1]['ended'] / 60:.1f} min, {dict(kinds)}, "
        f"{missed} of {seen['devices'] * len(rounds)} updates missed",
        f"median round without a missed update: {median(undisturbed):.1f} s",
        f"database {seen['database_bytes'] / 1e6:.1f} MB, logs {seen['log_bytes'] / 1e6:.1f} MB",
    ]
    by_part: dict[str, list[Growth]] = {}
    for growth in (Growth(**fields) for fields in seen["growths"]):
        kind = growth.program if growth.program in (SUPERLINK, SUPEREXEC) else "devices"
        by_part.setdefault(f"{kind}: {growth.part}", []).append(growth)
    for name, fits in sorted(by_part.items()):
        worst = max(fits, key=lambda fit: fit.per_100_rounds)
        rows.append(
            f"{name}: {len(fits)} fitted, median {median(fit.median for fit in fits):.0f} MiB, "
            f"growth in 100 rounds at most {worst.per_100_rounds:+.1%}"
        )
    if seen["asked_rounds"] < FITTED_FROM:
        rows.append(f"memory was not fitted: that takes {FITTED_FROM} rounds")
    apps = [one for one in seen["memory"] if one["part"] == CLIENT_APP]
    peaks = [max(sample[2] for sample in one["samples"]) for one in apps]
    rows.append(f"ClientApps seen: {len(peaks)}, largest {max(peaks, default=0):.0f} MiB")
    return "\n".join(rows)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        a_fleet(Path(scratch) / "fleet", given.devices) as fleet,
    ):
        seen = soak(fleet, given.rounds, given.seed)
    (given.folder / "soak.json").write_text(json.dumps(seen) + "\n")
    draw(given.folder / "soak.png", seen["memory"], seen["events"], seen["rounds"])
    say(summary(seen))
    found = problems(seen)
    say("\n".join(["FAILED", *found]) if found else f"passed: {given.folder / 'soak.json'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
