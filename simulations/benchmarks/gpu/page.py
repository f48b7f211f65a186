"""The tables of ``fedkn bench gpu`` as one page of Markdown and one JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from simulations.benchmarks.gpu.checks import Check
from simulations.benchmarks.gpu.convolutions import ConvolutionTime
from simulations.benchmarks.gpu.local_steps import StepTime
from simulations.benchmarks.gpu.networks import NetworkTime
from simulations.benchmarks.gpu.rounds import RoundTime
from simulations.benchmarks.results import machine

__all__ = ["Results"]


@dataclass
class Results:
    """What was measured so far, and what could not be: `failed` names case and reason."""

    checks: list[Check] = field(default_factory=list)
    steps: list[StepTime] = field(default_factory=list)
    convolutions: list[ConvolutionTime] = field(default_factory=list)
    networks: list[NetworkTime] = field(default_factory=list)
    rounds: list[RoundTime] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def as_json(self) -> str:
        """Return all figures and the machine as JSON."""
        content: dict[str, Any] = {"machine": machine(), **asdict(self)}
        return json.dumps(content, indent=1)

    def page(self) -> str:
        """Return the tables."""
        where = machine()
        parts = [f"{where['gpu'] or where['cpu']}, torch {where['torch']}"]
        if self.checks:
            parts.append(_table(_CHECKS, map(_check, self.checks)))
        if self.steps:
            parts.append(_table(_STEPS, map(_step, self.steps)))
        if self.convolutions:
            parts.append(_table(_CONVOLUTIONS, map(_convolution, self.convolutions)))
        if self.networks:
            parts.append(_table(_NETWORKS, _network(self.networks)))
        if self.rounds:
            parts.append(_table(_ROUNDS, map(_round, self.rounds)))
        parts += [f"FAILED {case}: {reason}" for case, reason in self.failed]
        return "\n\n".join(parts) + "\n"


_CHECKS = (
    "normalizer", "recorded", "same bits again", "same bits at once", "host waits",
    "difference from the CPU",
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
_ROUNDS = ("experiment", "engine", "s a round", "client-steps", "ms a client-step", "whole run, s")


def _check(check: Check) -> Sequence[str]:
    return (
        check.normalizer,
        "yes" if check.recorded else check.why_not or "no",
        "yes" if check.repeats else "NO",
        "yes" if check.concurrent else "NO",
        check.waits or "no",
        f"{check.difference:.1e}",
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
        str(time.client_steps),
        f"{1000 * time.round_seconds / max(1, time.client_steps):.3f}",
        f"{time.total_seconds:.1f}",
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
