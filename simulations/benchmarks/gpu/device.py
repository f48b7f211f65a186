"""The GPU, and all that the benchmark asks of it beyond what tensors can do.

Everything else of the benchmark runs on whatever device it is given, so that a test can run all of
it on the CPU with a double of this one class.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fedkn.gpus import make_current
from fedkn.training.captured import Captured
from simulations.benchmarks.results import machine
from simulations.engines.device_queues import open_queues

__all__ = ["Gpu"]

_MIB = 2**20


class Gpu:
    """A CUDA device.

    Args:
        name: ``cuda`` or ``cuda:N``.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def place(self) -> torch.device:
        """The device for tensors."""
        return torch.device(self.name)

    def open(self) -> None:
        """Prepare this process for it, before anything else is done."""
        open_queues()
        torch.set_num_threads(1)
        make_current(self.place.index or 0)

    def machine(self) -> dict[str, object]:
        """Return what the figures are measured on."""
        properties = torch.cuda.get_device_properties(self.place)
        return {
            **machine(),
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }

    def wait(self) -> None:
        """Wait for what it was given to do. Raises RuntimeError where it can do nothing more."""
        torch.cuda.synchronize(self.place)

    def clear(self) -> None:
        """Give back the memory that nobody holds any more, and count peaks anew."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.place)

    def held(self) -> float:
        """Return how much memory tensors hold now, in MiB."""
        return torch.cuda.memory_allocated(self.place) / _MIB

    def peak(self) -> float:
        """Return the most that they held since `clear`, in MiB."""
        return torch.cuda.max_memory_allocated(self.place) / _MIB

    def capture(self, function: Callable[[], None], changed: Sequence[Tensor] = ()) -> Captured:
        """Return `function` as one graph; `changed` is put back to what it was."""
        return Captured(function, changed)

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Raise RuntimeError inside the block where the host waits for the device."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def kernel_microseconds(self, function: Callable[[], None]) -> dict[str, float]:
        """Return by name how long the kernels of one call of `function` take on the device."""
        function()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            function()
            self.wait()
        return {
            event.key: event.self_device_time_total
            for event in recorded.key_averages()
            if event.self_device_time_total > 0
        }

    def milliseconds(self, call: Callable[[], object], *, seconds: float, calls: int = 10) -> float:
        """Return the median milliseconds of a call, of runs of `calls`, for about `seconds`."""
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            self.wait()
            started = time.perf_counter()
            for _ in range(calls):
                call()
            self.wait()
            times.append(1000 * (time.perf_counter() - started) / calls)
        # The first run pays for what is loaded and chosen once.
        counted = sorted(times[1:] or times)
        return counted[len(counted) // 2]
