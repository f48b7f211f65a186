"""Files that are written whole or not at all."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["expanded", "make_durable", "write_atomically"]


def expanded(path: str) -> Path:
    """Return `path` with ``~`` and ``~user`` at its beginning replaced by that user's home.

    Raises UserError where there is no such user, or no home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"'{printable(path)}' begins with the home of a user that is not known here: write the "
            "path in full"
        ) from None


def write_atomically(
    path: Path, content: bytes, *, mode: int | None = None, durable: bool = True
) -> None:
    """Write a file so that a reader or a kill sees the old content or the new, nothing between.

    Args:
        mode: its permissions from its first byte on, as in 0o600; None for the process's usual
            ones.
        durable: so that a power cut does too, for which each file waits for the disk. Who writes
            many does without, and then calls `make_durable` once.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode or 0o666)
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if not durable:
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable(folder: Path) -> None:
    """Wait until everything that was written in `folder`, by any process, is on its disk.

    What else waits to be written on that disk is waited for too.

    Raises:
        OSError: the disk failed.
    """
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(descriptor)
