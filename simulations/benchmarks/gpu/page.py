"""The tables of ``fedkn bench gpu`` as one page of Markdown and one JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from simulations.benchmarks.gpu.checks import Check
from simulations.benchmarks.gpu.convolutions import ConvolutionTime
from simulations.benchmarks.gpu.device_tests import MarkedOutcome
from simulations.benchmarks.gpu.layers import LayerTime
from simulations.benchmarks.gpu.local_steps import StepTime
from simulations.benchmarks.gpu.networks import NetworkTime
from simulations.benchmarks.gpu.rounds import RoundTime

__all__ = ["Failure", "Results"]


@dataclass(frozen=True)
class Failure:
    """A case that could not be measured, and why."""

    part: str
    case: str
    reason: str


@dataclass
class Results:
    """What was measured so far, and what could not be.

    Attributes:
        seconds: that there were. took: how many each part took. machine: what it was measured on.
    """

    seconds: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    tests: list[MarkedOutcome] = field(default_factory=list)
    steps: list[StepTime] = field(default_factory=list)
    rounds: list[RoundTime] = field(default_factory=list)
    networks: list[NetworkTime] = field(default_factory=list)
    layers: list[LayerTime] = field(default_factory=list)
    convolutions: list[ConvolutionTime] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)

    def add(self, part: str, figure: Any) -> None:
        """Take in what came of a case of `part`."""
        getattr(self, part).append(figure)

    def as_json(self) -> str:
        """Return all figures and the machine as JSON."""
        return json.dumps({"benchmark": "gpu", **asdict(self)}, indent=1)

    def page(self) -> str:
        """Return the tables."""
        machine = self.machine
        parts = [f"{machine.get('gpu') or machine.get('cpu')}, torch {machine.get('torch')}"]
        tables = (
            (self.checks, _CHECKS, map(_check, self.checks)),
            (self.tests, _TESTS, map(_test, self.tests)),
            (self.steps, _STEPS, map(_step, self.steps)),
            (self.rounds, _ROUNDS, map(_round, self.rounds)),
            (self.networks, _NETWORKS, _network(self.networks)),
            (self.layers, _LAYERS, map(_layer, self.layers)),
            (self.convolutions, _CONVOLUTIONS, map(_convolution, self.convolutions)),
        )
        parts += [_table(heads, rows) for figures, heads, rows in tables if figures]
        parts += [f"FAILED {of.part}: {of.case}: {of.reason}" for of in self.failed]
        spent = ", ".join(f"{part} {taken:.0f}" for part, taken in self.took.items())
        parts.append(f"Seconds: {spent or 'none'}, of {self.seconds:.0f}.")
        return "\n\n".join(parts) + "\n"


_CHECKS = (
    "normalizer", "recorded", "same bits again", "same bits at once", "host waits",
    "difference from the CPU",
)  # fmt: skip
_TESTS = ("file", "passed", "pytest says")
_LAYERS = (
    "maps", "layout", "dropout", "KNConv, ms", "conv + BatchNorm, ms", "ratio", "copy, GB/s",
    "share of it",
)  # fmt: skip
_STEPS = (
    "normalizer", "width", "batch", "way", "clients", "ms a step of all", "ms a client", "first, s",
    "peak, MiB",
)  # fmt: skip
_CONVOLUTIONS = (
    "clients", "batch", "channels", "filters", "side", "own, float32, ms", "cuDNN, float32, ms",
    "cuDNN, TF32, ms",
)  # fmt: skip
_NETWORKS = (
    "precision", "batch", "normalizer", "layout", "eager, ms", "graph, ms", "graph over batch",
    "peak, MiB",
)  # fmt: skip
_ROUNDS = (
    "experiment", "engine", "s a round", "with evaluations, s", "client-steps", "ms a client-step",
    "whole run, s",
)  # fmt: skip


def _check(check: Check) -> Sequence[str]:
    return (
        check.case.normalizer,
        "yes" if check.recorded else check.why_not or "no",
        "yes" if check.repeats else "NO",
        "yes" if check.concurrent else "NO",
        check.waits or "no",
        f"{check.difference:.1e}",
    )


def _test(outcome: MarkedOutcome) -> Sequence[str]:
    return str(outcome.case), "yes" if outcome.passed else "NO", outcome.summary


def _layer(time: LayerTime) -> Sequence[str]:
    case = time.case
    shares = ", ".join(f"{name} {share:.0%}" for name, share in time.shares.items())
    return (
        f"{case.batch}x{case.channels}x{case.side}x{case.side}",
        "channels last" if case.channels_last else "contiguous",
        f"{case.dropout:g}",
        f"{time.kernel:.3f}",
        f"{time.batch:.3f}",
        f"{time.kernel / time.batch:.2f}",
        f"{time.gigabytes:.0f}",
        shares,
    )


def _step(time: StepTime) -> Sequence[str]:
    case = time.case
    return (
        case.normalizer,
        str(case.width),
        str(case.batch),
        case.way,
        str(case.clients),
        f"{time.milliseconds:.2f}",
        f"{time.each:.3f}",
        f"{time.first_seconds:.1f}",
        f"{time.peak_mib:.0f}",
    )


def _convolution(time: ConvolutionTime) -> Sequence[str]:
    case = time.case
    sizes = (case.clients, case.batch, case.channels, case.filters, case.side)
    times = (time.own, time.grouped, time.grouped_tf32)
    return (*map(str, sizes), *(f"{taken:.3f}" for taken in times))


def _network(times: Sequence[NetworkTime]) -> Iterable[Sequence[str]]:
    best: dict[tuple[str, int], float] = {}
    for time in times:
        if time.case.normalizer == "batch":
            key = time.case.precision, time.case.batch
            best[key] = min(best.get(key, time.replayed), time.replayed)
    for time in times:
        case = time.case
        baseline = best.get((case.precision, case.batch))
        yield (
            case.precision,
            str(case.batch),
            case.normalizer,
            "channels last" if case.channels_last else "contiguous",
            f"{time.eager:.2f}",
            f"{time.replayed:.2f}",
            "" if baseline is None else f"{time.replayed / baseline:.2f}",
            f"{time.peak_mib:.0f}",
        )


def _round(time: RoundTime) -> Sequence[str]:
    return (
        time.case.title,
        time.engine,
        f"{time.round_seconds:.3f}",
        f"{time.wall_seconds:.3f}",
        str(time.client_steps),
        f"{1000 * time.round_seconds / max(1, time.client_steps):.3f}",
        f"{time.total_seconds:.1f}",
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
