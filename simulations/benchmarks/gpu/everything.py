"""Measures the parts of ``fedkn bench gpu`` in a given time, and loses nothing to one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simulations.benchmarks.gpu.cases import PARTS, Part
from simulations.benchmarks.gpu.device import Gpu
from simulations.benchmarks.gpu.page import Failure, Results
from simulations.benchmarks.gpu.process import CaseFailedError, MeasuringProcess

__all__ = ["measure_everything"]

_LONGEST_CASE = 90.0
"""Seconds: far more than any takes."""


def measure_everything(
    device: Gpu,
    *,
    parts: Sequence[str] = tuple(PARTS),
    seconds: float = 420.0,
    done: Callable[[Results], None] = lambda _: None,
    table: Mapping[str, Part] = PARTS,
) -> Results:
    """Measure `parts` on `device`, call `done` after each case, and return all figures.

    It ends within `seconds`: a case that is under way then is broken off. What is missing is named
    among the failed. `table` says which cases the parts have.
    """
    begun = time.monotonic()
    end = begun + seconds
    results = Results(seconds=seconds)
    process = MeasuringProcess(device, end=end, longest=_LONGEST_CASE)

    def take(part: str, case: Any) -> None:
        started = time.monotonic()
        try:
            results.add(part, process.measure(table[part].measure, case))
        except CaseFailedError as failure:
            results.failed.append(Failure(part, str(case), str(failure)))
        results.took[part] = results.took.get(part, 0.0) + time.monotonic() - started
        done(results)

    try:
        try:
            results.machine = process.machine()
        except CaseFailedError as failure:
            results.failed.append(Failure("machine", device.name, str(failure)))
        late: list[tuple[str, Any]] = []
        for place, part in enumerate(parts):
            shares = [table[name].share for name in parts[place:]]
            now = time.monotonic()
            until = now + (end - now) * shares[0] / sum(shares)
            for case in table[part].cases():
                if time.monotonic() < until:
                    take(part, case)
                else:
                    late.append((part, case))
        for part, case in late:
            if time.monotonic() < end:
                take(part, case)
            else:
                reason = f"there was no time left for it in {seconds:.0f} s"
                results.failed.append(Failure(part, str(case), reason))
    finally:
        process.close()
    done(results)
    return results
