"""The parts of the benchmark: the cases of each, and what measures one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from simulations.benchmarks.gpu.checks import check_cases, check_normalizer
from simulations.benchmarks.gpu.convolutions import convolution_cases, measure_convolution
from simulations.benchmarks.gpu.device import Gpu
from simulations.benchmarks.gpu.device_tests import marked_files, run_marked
from simulations.benchmarks.gpu.layers import layer_cases, measure_layer
from simulations.benchmarks.gpu.local_steps import measure_steps, step_cases
from simulations.benchmarks.gpu.networks import measure_network, network_cases
from simulations.benchmarks.gpu.rounds import measure_rounds, round_cases

__all__ = ["PARTS", "Part"]


@dataclass(frozen=True)
class Part:
    """A table of the benchmark.

    Attributes:
        cases: yields its cases, the most important first. measure: measures one on a device.
        share: of the time. What a part leaves is the next ones'; cases that it has no time left for
            come after the last part, if there is any time then.
    """

    cases: Callable[[], Iterable[Any]]
    measure: Callable[[Any, Gpu], Any]
    share: float


PARTS: dict[str, Part] = {
    "checks": Part(check_cases, check_normalizer, 0.20),
    "steps": Part(step_cases, measure_steps, 0.24),
    "rounds": Part(round_cases, measure_rounds, 0.25),
    "networks": Part(network_cases, measure_network, 0.11),
    "layers": Part(layer_cases, measure_layer, 0.06),
    "convolutions": Part(convolution_cases, measure_convolution, 0.03),
    "tests": Part(marked_files, run_marked, 0.11),
}
