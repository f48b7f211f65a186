"""How many of a GPU's queues a process may use: as many as clients work beside each other."""

from __future__ import annotations

import os

__all__ = ["open_queues"]


def open_queues() -> None:
    """Let CUDA, if it has not started, use 32 queues instead of 8, unless the user says otherwise.

    Streams that share a queue wait for each other.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
