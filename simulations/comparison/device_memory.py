"""What a worker process tells of its GPU: what it is, and how much memory a cell takes there."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from fedkn.gpus import gpu_state

__all__ = ["DeviceMemory", "state_of"]

_EVERY = 0.5
"""Seconds between two looks at the memory, which are of a counter on the host."""


def state_of(device: str) -> dict[str, Any] | str:
    """Return the `GpuState` of `device` as plain values, or in one line why it cannot be used."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device there"
    try:
        return asdict(gpu_state(torch.device(device)))
    except Exception as error:  # whatever a driver says is the reason
        return " ".join(str(error).split())[:300] or type(error).__name__


class DeviceMemory:
    """Watches how many bytes this process has reserved on `device`, and tells of every rise."""

    def __init__(self, device: str, tell: Callable[[int], None]) -> None:
        self._device = torch.device(device)
        self._tell = tell

    @contextmanager
    def watched(self, processes: int) -> Iterator[None]:
        """Tell, inside the block, the most bytes reserved since it began, times `processes`.

        What an earlier cell has left is given back before.
        """
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(processes, over), daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            watch.join()

    def _watch(self, processes: int, over: threading.Event) -> None:
        told = 0
        while True:
            last = over.wait(_EVERY)
            now = processes * torch.cuda.max_memory_reserved(self._device)
            if now > told:
                told = now
                self._tell(now)
            if last:
                return
