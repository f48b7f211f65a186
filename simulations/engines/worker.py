"""A worker process of an engine: it runs groups of clients until its parent is gone.

`WorkerProcess` is the parent's side; ``python -m simulations.engines.worker`` is the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
from typing import Any, NoReturn

from clients.local_state import Kept, Room
from fedkn.config import ExperimentConfig
from fedkn.experiment import data_summary, device_of
from fedkn.gpus import GpuFull, gpu_kind
from simulations.engines.channel import ClosedError, Inbox, Outbox, send
from simulations.engines.host import Request, layout_of
from simulations.engines.local_host import host_of
from simulations.engines.records import (
    Bytes,
    Received,
    pack_answers,
    pack_kept,
    unpack,
    unpack_kept,
)
from simulations.terminal import name_cell

__all__ = ["FULL", "IDLE", "OTHER", "READY", "WorkQueue", "WorkerProcess", "work"]

READY, IDLE, OTHER, FULL = -1, -2, -3, -4
"""Numbers of a worker's messages that are not the index of a group: it has come up, with these data
(a DataSummary); it found nothing more to do; its GPU is of another kind than its parent's, and of
which; its GPU was full, and why."""

_ITEM = struct.Struct("<II")

_MODULE = "simulations.engines.worker"
"""What a worker process runs, with the two descriptors of `work`."""


class WorkQueue:
    """A queue of groups that several processes take from: a pipe of (wave, index)."""

    CAPACITY = 4096
    """Groups at a time: they fit in a pipe's buffer, so filling it never waits."""

    def __init__(self, reader: int | None = None) -> None:
        """Make a queue, or take part in one as the worker that was given its `reader`."""
        self._read, self._write = os.pipe() if reader is None else (reader, -1)
        os.set_blocking(self._read, False)

    @property
    def reader(self) -> int:
        """The descriptor that a worker reads from."""
        return self._read

    def fill(self, wave: int, groups: int) -> None:
        """Put in groups 0 to `groups` - 1 of `wave`."""
        os.write(self._write, b"".join(_ITEM.pack(wave, index) for index in range(groups)))

    def take_any(self) -> tuple[int, int] | None:
        """Take the next (wave, index), None if there is none."""
        try:
            item = os.read(self._read, _ITEM.size)
        except BlockingIOError:
            return None
        if not item:
            # The parent is gone.
            raise ClosedError
        wave, index = _ITEM.unpack(item)
        return wave, index

    def take(self, wave: int) -> int | None:
        """Take the next group of `wave`; what is left of earlier ones is passed over."""
        while (item := self.take_any()) is not None:
            if item[0] == wave:
                return item[1]
        return None

    def close(self) -> None:
        """Close what this process holds of it."""
        for end in (self._read, self._write):
            if end >= 0:
                os.close(end)


class WorkerProcess:
    """A worker as its parent sees it.

    Attributes:
        place: which of the processes it is. ready: whether it has come up.
        idle_since: the last wave in which it found nothing more to do.
        inbox: what it sends.
    """

    def __init__(
        self, task: tuple[ExperimentConfig, bool], queue: WorkQueue, place: int, gpu: str
    ) -> None:
        self.place = place
        self.ready = False
        self.idle_since = 0
        self._cause = ""
        self.socket, theirs = socket.socketpair()
        self.inbox = Inbox(self.socket)
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    _MODULE,
                    str(theirs.fileno()),
                    str(queue.reader),
                ],
                stdin=subprocess.DEVNULL,
                env=_environment(gpu),
                pass_fds=(theirs.fileno(), queue.reader),
                # Ctrl-C reaches the whole process group of a terminal: leave it to the parent.
                process_group=0,
            )
        with contextlib.suppress(ClosedError):
            config, together = task
            kind = gpu_kind(device_of(config))
            send(self.socket, 0, (config.flat(), together, os.getpid(), kind))

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def kill(self, cause: str) -> None:
        """End the process; its socket then reads as closed."""
        self._cause = cause
        self._process.kill()

    def stop(self) -> str:
        """End the process now, wait until it is gone, and return what ended it."""
        died = self._process.poll() is not None
        self._process.kill()
        code = self._process.wait()
        self.socket.close()
        if self._cause:
            return self._cause
        if died and code >= 0:
            return f"it exited with code {code}"
        name = signal.Signals(-code).name if code < 0 else "its end"
        return f"ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _environment(gpu: str) -> dict[str, str]:
    return {
        **os.environ,
        # The parent's import path, so that both run the same code.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
    }


def _main(parent: socket.socket, queue: WorkQueue) -> NoReturn:
    inbox, outbox = Inbox(parent), Outbox(parent)
    _, (run_config, together, parent_id, kind), _ = inbox.receive()
    _die_with(parent_id)
    config = ExperimentConfig.resolve(run_config)
    name_cell(config.checkpoint.cell)
    own = gpu_kind(device_of(config))
    if own != kind:
        send(parent, OTHER, own or "none")
        while True:  # until its parent ends it
            inbox.receive()
    room = Room()
    host, found = host_of(config, together=together), data_summary(config)
    device = device_of(config)
    gc.freeze()  # as in the parent, but for good
    send(parent, READY, found)

    def read() -> tuple[int, list[list[Any]], Received]:
        wave, (anew, groups), received = inbox.receive()
        if anew:
            outbox.restart()
        return wave, groups, received

    wave, groups, received = read()
    while True:
        item = queue.take_any()
        if item is None:
            send(parent, IDLE, wave)
            wave, groups, received = read()
            continue
        while wave < item[0]:
            wave, groups, received = read()
        if wave > item[0]:
            continue  # left over from a wave that was broken off
        requests = [
            Request(
                node,
                kind,
                unpack(content, received, device),
                unpack_kept(state, received, Kept(room)),
            )
            for node, kind, content, state in groups[item[1]]
        ]
        known = [dict(request.state.versions) for request in requests]
        data = Bytes()
        try:
            answers = host.answer(requests)
        except GpuFull as error:
            send(parent, FULL, str(error))
            continue
        contents = pack_answers([one.content for one in answers], layout_of(requests), data)
        rest = [
            (one.error, pack_kept(one.state, data, there))
            for one, there in zip(answers, known, strict=True)
        ]
        outbox.send(item[1], (wave, contents, rest), data)


def _die_with(parent: int) -> None:
    """End this process when its parent does, even in the middle of a client's training."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


_PR_SET_PDEATHSIG = 1


def work(parent: int, queue: int) -> None:
    """Be a worker until the parent is gone: `parent` and `queue` are descriptors from it."""
    with contextlib.suppress(ClosedError):
        _main(socket.socket(fileno=parent), WorkQueue(queue))


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]))
