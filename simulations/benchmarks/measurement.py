"""Time and memory of cases taken in turn, as rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkn.layers.native import library as native
from fedkn.training.memory import peak_bytes, saved_activations
from simulations.benchmarks.results import Row
from simulations.benchmarks.timing import time_in_turn

__all__ = ["Case", "measured", "native_cases"]


@dataclass(frozen=True)
class Case:
    """A rival: what is timed, and the module whose saved activations are counted, if any.

    `kernels`: whether with fedkn's native CPU kernels, where they can be had.
    """

    step: Callable[[], None]
    module: nn.Module | None
    kernels: bool = True


def native_cases(
    name: str, step: Callable[[], None], module: nn.Module, device: torch.device
) -> dict[str, Case]:
    """Return `step` without fedkn's native CPU kernels and, where they can be had, with them."""

    def plain() -> None:
        with native.switched_off():
            step()

    cases = {f"{name}, plain": Case(plain, module, kernels=False)}
    if device.type == "cpu" and native.load():
        cases[f"{name}, native"] = Case(step, module)
    return cases


def measured(
    cases: Mapping[str, Case],
    x: Tensor,
    *,
    subject: str,
    baseline: str,
    repetitions: int,
    device: torch.device,
) -> list[Row]:
    """Time `cases` in turn, take their memory, and return a row for each."""
    timings = time_in_turn(
        {name: case.step for name, case in cases.items()}, repetitions=repetitions, device=device
    )
    peaks = {name: peak_bytes(case.step, device) for name, case in cases.items()}
    saved = {}
    for name, case in cases.items():
        if case.module is not None:
            with nullcontext() if case.kernels else native.switched_off():
                saved[name] = saved_activations(case.module, x)
    return [
        Row(
            case=name,
            subject=subject,
            batch_size=len(x),
            milliseconds=1000 * timing.median,
            ratio=timing.ratio(timings[baseline]),
            saved_bytes=saved.get(name),
            peak_bytes=peaks[name],
            saved_ratio=saved[name] / saved[baseline] if name in saved else None,
            peak_ratio=peaks[name] / peaks[baseline],
        )
        for name, timing in timings.items()
    ]
