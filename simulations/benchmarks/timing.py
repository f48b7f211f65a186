"""Timing rivals in turn, so that a machine that slows down slows all of them down."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Timing", "geometric_mean", "time_in_turn"]

# A measurement runs its case so often that it lasts this long: far above the clock's resolution.
_SECONDS = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one case, one entry per repetition, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    def ratio(self, baseline: Timing) -> float:
        """Return the median over the repetitions of this case's time over `baseline`'s."""
        pairs = zip(self.seconds, baseline.seconds, strict=True)
        return statistics.median(mine / other for mine, other in pairs)


def time_in_turn(
    cases: Mapping[str, Callable[[], object]],
    *,
    repetitions: int,
    device: torch.device,
) -> dict[str, Timing]:
    """Time every case `repetitions` times, the cases in turn: A B C, B C A, C A B, …

    Each measurement is of as many calls as take about 20 ms, after half as many that do not count:
    a case always follows the same other, and what that one left in the caches and the allocator is
    not its own. On CUDA it ends when the device is idle.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    calls: dict[str, int] = {}
    for name, case in cases.items():
        for _ in range(3):
            case()
        wait()
        start = time.perf_counter()
        case()
        wait()
        calls[name] = max(1, round(_SECONDS / (time.perf_counter() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    for repetition in range(repetitions):
        shift = repetition % len(order)
        for name in order[shift:] + order[:shift]:
            case = cases[name]
            for _ in range(max(1, calls[name] // 2)):
                case()
            wait()
            start = time.perf_counter()
            for _ in range(calls[name]):
                case()
            wait()
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def geometric_mean(values: list[float]) -> float:
    """Return the geometric mean of positive `values`."""
    return statistics.geometric_mean(values)
