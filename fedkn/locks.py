"""One writer of a folder: a lock of the kernel's, which ends when its holder does, however."""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["HELD", "Taken", "held"]

HELD = "FEDKN_HELD"
"""Environment variable of a process that was handed the lock of the folder it names."""


_PATIENCE_SECONDS = 5.0


class Taken(UserError):
    """Another process writes the folder; the text says which."""


@contextmanager
def held(folder: Path, advice: str = "") -> Iterator[int | None]:
    """Hold `folder` for this process as its one writer; yields the lock's descriptor.

    Who holds it, on which host and since when, stands in ``.lock``, for whoever is refused. A
    process that was started with the descriptor, and with `HELD` naming the folder, writes under
    the lock of whoever started it: it gets None.

    Args:
        advice: what somebody who is refused can do about this holder.

    Raises:
        Taken: another process holds it, and still does after a few seconds, in which one that
            was killed just now may be on its way out.
        UserError: there is no file to lock, or the folder's disk knows no locks.
    """
    if os.environ.get(HELD) == str(folder.resolve()):
        yield None
        return
    descriptor = _open(folder / ".lock")
    try:
        _lock(descriptor, folder, time.monotonic() + _PATIENCE_SECONDS)
        _sign(descriptor, advice)
        yield descriptor
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        # A lock needs no permission to write, and whoever writes next will say that there is none.
        with suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        raise UserError(
            f"cannot write {path} ({error.strerror}): make the folder writable, free space, or "
            "give another"
        ) from None


def _lock(descriptor: int, folder: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Taken(
                    f"'{folder}' is being run by another process{_holder(descriptor)}"
                ) from None
        except OSError as error:
            raise UserError(
                f"'{folder}' cannot be locked ({error.strerror}), and two runs must not write it: "
                "give a folder on a disk that knows locks"
            ) from None
        time.sleep(0.1)


def _sign(descriptor: int, advice: str) -> None:
    began = datetime.now(UTC).isoformat(timespec="seconds")
    who = f"pid {os.getpid()} on {platform.node()}, since {began}"
    # What is written is for people: a full disk does not make the lock any weaker.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{who}\n{advice}\n".encode(errors="replace"), 0)


def _holder(descriptor: int) -> str:
    """Return who holds the lock and what can be done, as the holder says it."""
    who, _, advice = os.pread(descriptor, 4096, 0).decode(errors="replace").partition("\n")
    known = f" ({printable(who)})" if who.strip() else ""
    return f"{known}: {printable(advice, 400) or 'wait for it, or stop it'}"
