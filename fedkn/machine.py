"""What this process may use of its machine, on every system that Python runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["processor", "usable_cores"]


def usable_cores() -> int:
    """Return how many cores this process may run on, one at least.

    Where the system can bind a process to some of its cores (Linux: ``taskset``, a container's
    cpuset), these; elsewhere (macOS) all that there are.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Return the processor's name as Linux gives it, elsewhere Python's word for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown"
