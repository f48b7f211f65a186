"""Resident memory of a fleet's processes over time: sampled, fitted, drawn."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from server.deployment.fleet import Fleet
from server.deployment.processes import Running, running
from server.deployment.programs import SUPEREXEC, SUPERLINK

__all__ = ["CLIENT_APP", "FITTED_ROUNDS", "WARM_UP_ROUNDS", "Growth", "Memory", "draw"]

MIB = 2**20
CLIENT_APP = "ClientApp"
# Rounds of a process's life that are not fitted, and how many it must have lived through after.
WARM_UP_ROUNDS = 10
FITTED_ROUNDS = 15


@dataclass
class Series:
    """One process: its program in the fleet, its part in it, and samples (s, rounds, MiB)."""

    program: str
    part: str
    samples: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Growth:
    """A line fitted to the resident memory of one process.

    `median` in MiB; `per_100_rounds` is the line's slope as a part of the median.
    """

    program: str
    part: str
    rounds: float
    median: float
    per_100_rounds: float


class Memory:
    """The resident memory of all processes of a fleet, from life to death."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._series: dict[tuple[int, float], Series] = {}
        self._began = time.monotonic()

    def sample(self, rounds: float) -> None:
        """Take one sample of every process; `rounds` is how many rounds have ended."""
        now = time.monotonic() - self._began
        for one in running(self._fleet):
            try:
                process = psutil.Process(one.pid)
                part = _part(one, process)
                resident = process.memory_info().rss / MIB
            except psutil.Error:
                continue
            series = self._series.setdefault((one.pid, one.started), Series(one.name, part))
            # A process says who it is a moment after it was started; one that died has no memory.
            series.part = part
            if resident:
                series.samples.append((now, rounds, resident))

    def growths(self) -> list[Growth]:
        """Return the fit of every process that lived long enough for one."""
        fits = (_fit(series) for series in self._series.values() if series.part != CLIENT_APP)
        return [fit for fit in fits if fit]

    def table(self) -> list[dict[str, Any]]:
        """Return all samples, as JSON takes them."""
        return [
            {
                "program": one.program,
                "part": one.part,
                "samples": [[round(value, 2) for value in sample] for sample in one.samples],
            }
            for one in self._series.values()
        ]


def draw(
    path: Path,
    table: Iterable[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    rounds: Sequence[Mapping[str, Any]],
) -> None:
    """Draw memory over time, with the events as lines and each round's updates below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, middle, below) = plt.subplots(
        3, 1, figsize=(9, 8), sharex=True, height_ratios=(3, 3, 1), layout="constrained"
    )
    colours: dict[str, str] = {}
    for one in filter(lambda series: series["samples"], table):
        server = one["program"] in (SUPERLINK, SUPEREXEC)
        times, _, sizes = np.array(one["samples"]).T
        label = one["part"]
        new = label not in colours
        colour = colours.setdefault(label, f"C{len(colours)}")
        (above if server else middle).plot(
            times / 60,
            sizes,
            "." if label == CLIENT_APP else "-",
            color=colour,
            label=label if new else None,
            linewidth=1.0,
            markersize=1.5,
        )
    for event in events:
        dash = "-" if event["kind"] == "kill" else ":"
        for axis in (above, middle):
            axis.axvline(event["began"] / 60, color="0.7", linestyle=dash, linewidth=0.7, zorder=0)
    for axis, title in ((above, "server"), (middle, "devices")):
        axis.set(ylim=(0, None), ylabel=f"{title}: MiB resident")
        axis.legend(loc="lower right", fontsize="small", ncols=5)
    ends = [line["ended"] / 60 for line in rounds]
    below.step(ends, [line["updates"] for line in rounds], where="pre", color="0.2")
    below.set(ylim=(0, None), ylabel="updates", xlabel="minutes (— killed, ··· restarted)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _part(one: Running, process: psutil.Process) -> str:
    """Return what a process is to the program that it belongs to."""
    if one.name == SUPERLINK:
        return "SuperLink"
    command = " ".join(process.cmdline())
    if "flwr-serverapp" in command:
        return "ServerApp"
    if "resource_tracker" in command:
        return "resource tracker"
    if "forkserver" in command:
        parent = process.parent()
        forked = parent is not None and "forkserver" in " ".join(parent.cmdline())
        return CLIENT_APP if forked else "fork server"
    return "SuperExec" if "superexec" in command else "SuperNode"


def _fit(series: Series) -> Growth | None:
    if not series.samples:
        return None
    rounds, sizes = np.array(series.samples)[:, 1:].T
    kept = rounds >= rounds[0] + WARM_UP_ROUNDS
    if not kept.any() or np.ptp(rounds[kept]) < FITTED_ROUNDS:
        return None
    slope = float(np.polyfit(rounds[kept], sizes[kept], 1)[0])
    median = float(np.median(sizes[kept]))
    lived = float(np.ptp(rounds[kept]))
    return Growth(series.program, series.part, lived, median, 100 * slope / median)
