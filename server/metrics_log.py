"""The run's append-only log of metrics: one JSON object a line (docs/run-folder.md)."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

from fedkn.errors import FedknError

__all__ = ["LogNotWritten", "MetricsLog"]


class LogNotWritten(FedknError):
    """The disk does not take the log: full, or not to be written."""


class MetricsLog:
    """Appends lines to ``metrics.jsonl`` of a run folder; without a folder it writes nothing.

    The cells of a run, each in a process of its own, share the file: every line is written under a
    lock, which the kernel releases when a process dies.
    """

    def __init__(self, folder: str | Path | None, cell: str) -> None:
        self._path = Path(folder) / "metrics.jsonl" if folder else None
        self._cell = cell

    def write(self, kind: str, **fields: Any) -> None:
        """Append a line of `kind`. A float that is not finite becomes null: JSON has no NaN.

        Raises:
            LogNotWritten: no space, no permission, or no such folder.
        """
        if self._path is None:
            return
        fields = {key: _plain(value) for key, value in fields.items()}
        text = json.dumps({"cell": self._cell, "kind": kind, **fields}, allow_nan=False)
        try:
            _append(self._path, text)
        except OSError as error:
            raise LogNotWritten(
                f"cannot write {self._path} ({error.strerror or error}): free space, or let it be "
                "written, and resume"
            ) from error


def _append(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # A kill or a full disk may have left half a line: close it, so that this one can be read.
        prefix = "" if _ends_with_newline(path) else "\n"
        line = f"{prefix}{text}\n".encode()
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        if not file.tell():
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
