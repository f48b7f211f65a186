"""Measures all parts of ``fedkn bench gpu`` one after another, and loses nothing to one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from fedkn import normalizers
from simulations.benchmarks.gpu.checks import check_normalizer
from simulations.benchmarks.gpu.convolutions import convolution_cases, measure_convolution
from simulations.benchmarks.gpu.local_steps import measure_steps, step_cases
from simulations.benchmarks.gpu.networks import measure_network, network_cases
from simulations.benchmarks.gpu.page import Results
from simulations.benchmarks.gpu.rounds import measure_rounds, round_cases

__all__ = ["PARTS", "measure_everything"]

ValueT = TypeVar("ValueT")
PARTS = ("checks", "steps", "convolutions", "networks", "rounds")


def measure_everything(
    device: torch.device,
    *,
    parts: Sequence[str] = PARTS,
    quick: bool = False,
    seconds: float = 420.0,
    done: Callable[[Results], None] = lambda _: None,
) -> Results:
    """Measure `parts` on `device`, call `done` after each figure, and return all of them.

    No case is begun when `seconds` are over: what is missing then is named among the failed.
    """
    results, end = Results(), time.monotonic() + seconds

    def take(name: str, into: list[ValueT], measure: Callable[[], ValueT]) -> None:
        if time.monotonic() > end:
            results.failed.append((name, f"not begun within {seconds:.0f} s"))
            return
        try:
            into.append(measure())
        except Exception as error:  # one case that fails must not take the others' figures along
            reason = (str(error).strip().splitlines() or [""])[0]
            results.failed.append((name, f"{type(error).__name__}: {reason}"))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        done(results)

    measures: dict[str, Any] = {
        "checks": lambda: [
            (f"check of {name}", results.checks, partial(check_normalizer, name, device))
            for name in normalizers.names()
        ],
        "steps": lambda: [
            (str(case), results.steps, partial(measure_steps, case, device))
            for case in step_cases(quick)
        ],
        "convolutions": lambda: [
            (str(case), results.convolutions, partial(measure_convolution, case, device))
            for case in convolution_cases()
        ],
        "networks": lambda: [
            (str(case), results.networks, partial(measure_network, case, device, seconds=0.3))
            for case in network_cases(quick)
        ],
        "rounds": lambda: [
            (case.title, results.rounds, partial(measure_rounds, case, str(device)))
            for case in round_cases(quick)
        ],
    }
    for part in parts:
        for name, into, measure in measures[part]():
            take(name, into, measure)
    return results
