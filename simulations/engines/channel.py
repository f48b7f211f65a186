"""What an engine and its worker processes say to each other: values, and bytes in shared memory.

A message is a few numbers on a socket, and a file in memory that holds the rest: one of its own,
handed over with them, or a place in one that both have open. The files have no names, so nothing is
left behind whoever dies.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import struct
import tempfile
from collections.abc import Sequence
from typing import Any

from simulations.engines.records import Bytes, Received, aligned

__all__ = ["ClosedError", "Inbox", "Letter", "Outbox", "send"]

# A number, whether the place is in a file that is used again, where it begins, and the length of
# the pickled value, after which the bytes follow.
_HEAD = struct.Struct("<q?qq")


class ClosedError(Exception):
    """The other process is gone."""


class Letter:
    """A message ready to be sent, any number of times: a number, a value, and bytes."""

    def __init__(self, number: int, value: object, data: Bytes) -> None:
        text = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        self._head = _HEAD.pack(number, False, 0, len(text))
        self._file = _nameless()
        with os.fdopen(os.dup(self._file), "wb") as file:
            for piece in (text, _filling(text), *data.pieces):
                file.write(piece)

    def send(self, to: socket.socket) -> None:
        """Send it. Raises ClosedError."""
        _send(to, self._head, [self._file])

    def close(self) -> None:
        """Free its memory, once those who got it have."""
        os.close(self._file)


class Outbox:
    """Sends messages through one file in memory, as long as there is room in it.

    To make a file, and to find memory for it, takes longer than to copy a small network into it.
    What was sent stays as it was until `restart`.
    """

    def __init__(self, to: socket.socket) -> None:
        self._to = to
        self._file = _nameless()
        self._memory: mmap.mmap | None = None
        self._used = 0

    def restart(self) -> None:
        """Begin at the beginning: whoever was sent anything has no more use for it."""
        self._used = 0

    def send(self, number: int, value: object, data: Bytes) -> None:
        """Send a message. Raises ClosedError."""
        text = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        begin = aligned(self._used)
        end = begin + aligned(len(text)) + data.size
        if end > _MOST:
            send(self._to, number, value, data)
            return
        files = []
        if self._memory is None or end > len(self._memory):
            size = min(_MOST, max(_LEAST, 2 * end))
            os.ftruncate(self._file, size)
            self._memory = mmap.mmap(self._file, size)
            files = [self._file]
        place = begin
        for piece in (text, _filling(text), *data.pieces):
            self._memory[place : place + len(piece)] = piece
            place += len(piece)
        self._used = end
        _send(self._to, _HEAD.pack(number, True, begin, len(text)), files)


_LEAST, _MOST = 1 << 20, 1 << 26
"""Bytes that the file of an outbox has: what is larger takes longer to train."""


class Inbox:
    """Receives what was sent in any of these ways."""

    def __init__(self, source: socket.socket) -> None:
        self._source = source
        self._memory: mmap.mmap | None = None

    def receive(self) -> tuple[int, Any, Received]:
        """Return the next message's number, value, and bytes. Raises ClosedError."""
        head, files = b"", []
        while len(head) < _HEAD.size:
            try:
                part, more, _, _ = socket.recv_fds(self._source, _HEAD.size - len(head), 1)
            except ConnectionResetError as error:
                raise ClosedError from error
            if not part:
                raise ClosedError
            head += part
            files += more
        number, again, begin, text = _HEAD.unpack(head)
        memory = self._memory if again else None
        for file in files:
            # Writable, for this process alone: tensors on memory that is not are warned of.
            memory = mmap.mmap(file, 0, flags=mmap.MAP_SHARED if again else mmap.MAP_PRIVATE)
            os.close(file)
        if again:
            self._memory = memory
        assert memory is not None
        value = pickle.loads(memory[begin : begin + text])
        return number, value, Received(memory, begin + aligned(text), lasting=again)


def send(to: socket.socket, number: int, value: object, data: Bytes | None = None) -> None:
    """Send a message once. Raises ClosedError."""
    letter = Letter(number, value, data or Bytes())
    try:
        letter.send(to)
    finally:
        letter.close()


def _send(to: socket.socket, head: bytes, files: Sequence[int]) -> None:
    try:
        socket.send_fds(to, [head], files)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ClosedError from error


def _filling(text: bytes) -> bytes:
    return bytes(aligned(len(text)) - len(text))


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedkn", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
