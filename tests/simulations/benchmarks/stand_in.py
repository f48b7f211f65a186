"""A double of the GPU on the CPU: what is captured runs at once, and steps are recorded by it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkn.training.captured import Captured
from fedkn.training.recorded import StepRecorder
from fedkn.training.stacked_workspace import StackedWorkspace
from fedkn.training.workspace import Workspace
from simulations.benchmarks.engine_tasks import Task
from simulations.benchmarks.gpu import convolutions
from simulations.benchmarks.gpu.checks import CheckCase
from simulations.benchmarks.gpu.convolutions import ConvolutionCase
from simulations.benchmarks.gpu.device import Gpu
from simulations.benchmarks.gpu.layers import LayerCase
from simulations.benchmarks.gpu.local_steps import StepCase
from simulations.benchmarks.gpu.networks import NetworkCase
from simulations.benchmarks.gpu.rounds import RoundCase
from simulations.benchmarks.results import machine
from tests.fedkn.training.test_recorded import Double

__all__ = ["StandIn", "kind", "small"]


class StandIn(Gpu):
    """A device that is not there. `folder`: where it notes every process that it is opened in."""

    def __init__(self, folder: Path) -> None:
        super().__init__("cpu")
        self._folder = folder

    def open(self) -> None:
        """Note the process, and record steps in it."""
        torch.set_num_threads(1)
        count = len(list(self._folder.glob("process-*")))
        (self._folder / f"process-{count}").touch()
        convolutions.convolve_stacked = _convolve  # type: ignore[assignment]
        take_over, begin = Workspace._take_over, StackedWorkspace.__init__

        def with_recorder(workspace: Workspace, optimizer: Any) -> None:
            take_over(workspace, optimizer)
            workspace.recorder = StepRecorder(workspace, Double)

        def with_capture(workspace: StackedWorkspace, *args: Any, **kwargs: Any) -> None:
            begin(workspace, *args, **kwargs)
            workspace.capture = Double

        Workspace._take_over = with_recorder  # type: ignore[method-assign]
        StackedWorkspace.__init__ = with_capture  # type: ignore[method-assign]

    def machine(self) -> dict[str, object]:
        """Return this machine with a card in it."""
        return {**machine(), "gpu": "stand-in"}

    def wait(self) -> None:
        """Nothing is under way."""

    def clear(self) -> None:
        """As far as there is anything to clear."""
        gc.collect()

    def held(self) -> float:
        """Return nothing."""
        return 0.0

    def peak(self) -> float:
        """Return a number to be seen in the tables."""
        return 77.0

    def capture(self, function: Callable[[], None], changed: Sequence[Tensor] = ()) -> Captured:
        """Return `function` itself."""
        return Double(function, changed)

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Nobody waits."""
        yield

    def kernel_microseconds(self, function: Callable[[], None]) -> dict[str, float]:
        """Return kernels as the profiler names them."""
        function()
        return {"channel_sums": 2.0, "epilogue_0d1d": 4.0, "reduce_gradient": 3.0, "gemm": 9.0}

    def milliseconds(self, call: Callable[[], object], *, seconds: float, calls: int = 10) -> float:
        """Return the time of one call."""
        assert seconds > 0
        assert calls > 0
        return super().milliseconds(call, seconds=0.0, calls=1)


def _convolve(x: Tensor, weight: Tensor, bias: None, geometry: Any) -> Tensor:
    def one(maps: Tensor, filters: Tensor) -> Tensor:
        return torch.conv2d(maps, filters, bias, padding=geometry.padding)

    return torch.func.vmap(one)(x, weight)


def small(case: Any) -> Any:  # noqa: PLR0911 - one for each kind
    """Return `case` in a size that a CPU gets through at once."""
    match case:
        case CheckCase():
            return replace(case, width=4, side=8)
        case StepCase():
            return replace(case, width=4, side=8, steps=2, clients=min(case.clients, 3))
        case NetworkCase():
            return replace(case, width=4, batch=2)
        case LayerCase():
            return replace(case, batch=2, channels=4, side=6)
        case ConvolutionCase():
            return replace(case, clients=2, batch=1, filters=4, side=6)
        case RoundCase(task=task):
            settings = {**task.settings, "cohort": 4, "model.width": 4, "evaluation.every": 2}
            if "train.local_steps" in settings:
                settings["train.local_steps"] = 1
            tiny = Task(task.title, 5, 10, 4, settings, test_images=20)
            return replace(case, task=tiny)
    return case


def kind(case: Any) -> object:
    """Return what the cases have in common that go the same way through the code."""
    match case:
        case CheckCase() | StepCase():
            return getattr(case, "way", ""), case.normalizer in ("kernel", "batch")
        case NetworkCase():
            return case.precision, case.channels_last
        case LayerCase():
            return case.channels_last, case.dropout > 0
        case RoundCase():
            return case.task.title, case.task.settings.get("engine")
    return type(case)
