"""Lets the C library keep the memory that training frees."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_M_MXFAST, _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = 1, -1, -3
_ALWAYS_KEEP = 1_000_000_000
_OLD_LIMIT = 32 * 1024 * 1024


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the kernel, in this process; elsewhere nothing.

    By default it returns the activations of every step and has them faulted in again in the next:
    up to half of the time of small-batch training on the CPU. As MALLOC_TRIM_THRESHOLD_ and
    MALLOC_MMAP_THRESHOLD_ in the environment, which count only at a process's start.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_TRIM_THRESHOLD, _ALWAYS_KEEP)
    # Small pieces kept aside are swept together at every large allocation: several times a step.
    mallopt(_M_MXFAST, 0)
    # Before glibc 2.35 anything above half a heap's size was refused.
    if not mallopt(_M_MMAP_THRESHOLD, _ALWAYS_KEEP):
        mallopt(_M_MMAP_THRESHOLD, _OLD_LIMIT)
