"""A process that measures one case after another, so that none of them can take the others along.

A kernel that goes astray leaves its process without a device, and one that never ends cannot be
interrupted: either costs its own case, and the next gets a new process.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import psutil

from simulations.benchmarks.gpu.device import Gpu

__all__ = ["CaseFailedError", "MeasuringProcess"]


class CaseFailedError(Exception):
    """A case could not be measured; the message says why, in one line."""


class MeasuringProcess:
    """Measures cases on `device` in a process that is started when it is needed.

    Args:
        end: when all has to be over, by the monotonic clock. longest: seconds that a case may take.
    """

    def __init__(self, device: Gpu, *, end: float, longest: float) -> None:
        self._device = device
        self._end = end
        self._longest = longest
        self._spawn = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Connection | None = None

    def machine(self) -> dict[str, Any]:
        """Return what the figures are measured on. Raises CaseFailedError as `measure`."""
        found: dict[str, Any] = self._asked(None)
        return found

    def measure(self, measure: Callable[[Any, Gpu], Any], case: Any) -> Any:
        """Return ``measure(case, device)``, of a function that can be found by its name.

        Raises:
            CaseFailedError: it raised, took its process along, or did not end in time.
        """
        return self._asked((measure, case))

    def close(self) -> None:
        """End the process and those that it has started, whatever they are doing."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            family: list[psutil.Process] = []
            with suppress(psutil.NoSuchProcess):
                family = psutil.Process(self._process.pid).children(recursive=True)
            self._process.kill()
            self._process.join()
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process = self._pipe = None

    def _begin(self) -> None:
        self._pipe, theirs = self._spawn.Pipe()
        self._process = self._spawn.Process(target=_serve, args=(self._device, theirs))
        self._process.start()
        theirs.close()
        self._answer(_STARTS)

    def _asked(self, question: tuple[Callable[[Any, Gpu], Any], Any] | None) -> Any:
        if self._process is None:
            self._begin()
        assert self._pipe is not None
        with suppress(OSError):  # it died, and the answer says so
            self._pipe.send(question)
        answer, error, usable = self._answer(self._longest)
        if not usable:
            self.close()
        if error:
            raise CaseFailedError(error)
        return answer

    def _answer(self, limit: float) -> Any:
        assert self._pipe is not None
        limit = max(0.0, min(limit, self._end - time.monotonic()))
        try:
            if not self._pipe.poll(limit):
                self.close()
                raise CaseFailedError(f"it did not end within {limit:.0f} s")
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            raise CaseFailedError(f"its process ended with code {code}") from None


_STARTS = 90.0
"""Seconds in which a process comes up, on a slow disk too."""


def _serve(device: Gpu, parent: Connection) -> None:
    device.open()
    parent.send("up")
    while True:
        try:
            question = parent.recv()
        except EOFError:
            return
        answer, error = None, ""
        try:
            if question is None:
                answer = device.machine()
            else:
                measure, case = question
                device.clear()
                answer = measure(case, device)
        except Exception as failure:  # whatever it is, it is this case's
            error = _line(failure)
        parent.send((answer, error, _usable(device)))


def _usable(device: Gpu) -> bool:
    """Whether the device can be used in this process any more, after what may have gone wrong."""
    try:
        device.wait()
        device.clear()
    except Exception:
        return False
    return True


def _line(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500] if lines else ''}"
