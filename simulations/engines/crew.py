"""A process and its workers, who share out the clients of a round among themselves.

Whoever is free takes the next group of clients from a queue, this process too. A client's update
is a function of what it was sent and of its data, so who trains it, and when, changes nothing.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedkn.config import ExperimentConfig
from fedkn.experiment import data_summary, device_of
from fedkn.gpus import GpuFull
from server.run_data import refuse_changes
from simulations.engines.channel import ClosedError, Letter
from simulations.engines.host import Answer, ClientHost, Request, layout_of
from simulations.engines.records import Bytes, pack, pack_kept, unpack_answers, unpack_kept
from simulations.engines.worker import FULL, IDLE, OTHER, READY, WorkerProcess, WorkQueue

__all__ = ["PATIENCE", "Crew"]

_LOG = logging.getLogger("flwr")

PATIENCE = 1.0
"""Seconds of training after which workers are started: one takes two or three to come up."""


_TICK = 0.5


class Crew:
    """Runs groups of clients in this process and in `size` - 1 workers.

    Workers are started once there is work for them, and kept until `close`. One that dies costs the
    clients that it was training an error reply, and is replaced.

    Args:
        host: runs clients in this process.
        task: the experiment, and whether its clients train together: from these the workers make a
            host of their own.
        size: the number of processes, this one included.
        gpus: for each of them the only CUDA device it sees (empty: no restriction).
    """

    def __init__(
        self,
        host: ClientHost,
        task: tuple[ExperimentConfig, bool],
        size: int,
        *,
        gpus: Sequence[str] = (),
    ) -> None:
        self._host = host
        self._task = task
        self._device = device_of(task[0])
        self._size = size
        self._gpus = gpus
        self._queue = WorkQueue()
        self._selector = selectors.DefaultSelector()
        self._workers: list[WorkerProcess] = []
        self._started = False
        self._busy = 0.0
        self._wave = 0
        self._round: _Round | None = None

    def answer(
        self, groups: Sequence[Sequence[Request]], timeout: float | None = None
    ) -> list[list[Answer]]:
        """Return the answers to `groups` of requests, whose order is that of starting them.

        A worker that has not answered `timeout` seconds from now is ended, and its group's answers
        are errors. This process's own clients cannot be interrupted.

        Raises:
            DataChanged: a worker found other data than this process.
            GpuFull: the memory of a GPU did not suffice.
        """
        answers: list[list[Answer]] = []
        for start in range(0, len(groups), WorkQueue.CAPACITY):
            part = groups[start : start + WorkQueue.CAPACITY]
            answers += self._answer(part, timeout, anew=start == 0)
        return answers

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()
        self._selector.close()
        self._queue.close()

    def _answer(
        self, groups: Sequence[Sequence[Request]], timeout: float | None, *, anew: bool
    ) -> list[list[Answer]]:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._wave += 1
        self._round = current = _Round(groups, anew)
        try:
            if self._size == 1:
                for index in range(len(groups)):
                    self._train(index)
            else:
                self._share_out(current, deadline)
        finally:
            current.close()
            self._round = None
        return current.results()

    def _share_out(self, current: _Round, deadline: float | None) -> None:
        """Train groups here while workers train others, until all are trained or lost."""
        self._queue.fill(self._wave, len(current.groups))
        if self._started:
            self._post(self._workers)
        while current.left:
            index = self._queue.take(self._wave)
            if index is not None:
                self._train(index)
                self._collect(0.0)
            elif self._lost():
                break
            elif deadline is not None and time.monotonic() > deadline:
                self._end_stragglers()
            else:
                self._collect(0.5 if deadline is None else min(0.5, deadline - time.monotonic()))

    # -- this process's own share -----------------------------------------------------------------

    def _train(self, index: int) -> None:
        assert self._round is not None
        group = [request.copied() for request in self._round.groups[index]]
        started = time.monotonic()
        self._round.settle(index, self._host.answer(group))
        self._busy += time.monotonic() - started
        if not self._started and self._size > 1 and self._busy > PATIENCE:
            self._started = True
            for place in range(1, self._size):
                self._start(place)

    # -- the workers ------------------------------------------------------------------------------

    def _start(self, place: int) -> None:
        gpu = self._gpus[place] if self._gpus else ""
        worker = WorkerProcess(self._task, self._queue, place, gpu)
        self._workers.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        if self._round is not None:
            self._post([worker])

    def _post(self, workers: Sequence[WorkerProcess]) -> None:
        assert self._round is not None
        for worker in list(workers):
            try:
                self._round.letter(self._wave).send(worker.socket)
            except ClosedError:
                self._bury(worker)

    def _collect(self, patience: float) -> None:
        """Take what the workers have to say, waiting up to `patience` seconds for the first."""
        while ready := self._selector.select(max(0.0, patience)):
            for key, _ in ready:
                self._hear(key.data)
            patience = 0.0

    def _hear(self, worker: WorkerProcess) -> None:
        try:
            number, value, received = worker.inbox.receive()
        except ClosedError:
            self._bury(worker)
            return
        if number == READY:
            # It has read them anew: who trains a client must change nothing.
            refuse_changes(data_summary(self._task[0]), value, "this run")
            worker.ready = True
        elif number == OTHER:
            # Another kind of GPU gives other bits, and which clients it trains is chance.
            worker.kill(f"its GPU ({value}) is not of the kind that this run began on")
        elif number == FULL:
            raise GpuFull(value)
        elif number == IDLE:
            worker.idle_since = value
        elif self._round is not None:
            wave, contents, rest = value
            if wave == self._wave:
                group = self._round.groups[number]
                found = unpack_answers(contents, layout_of(group), received, self._device)
                answers = [
                    Answer(content, error, unpack_kept(state, received, request.state))
                    for request, content, (error, state) in zip(group, found, rest, strict=True)
                ]
                self._round.settle(number, answers)

    def _bury(self, worker: WorkerProcess) -> None:
        """Note that `worker` is dead, and start another unless it never came to life."""
        self._selector.unregister(worker.socket)
        self._workers.remove(worker)
        cause = worker.stop()
        _LOG.warning("a worker process died: %s", cause)
        if self._round is not None:
            self._round.causes.append(cause)
        if worker.ready:
            self._start(worker.place)

    def _lost(self) -> bool:
        """Whether what is left was with workers that died: the queue is empty, and nobody works."""
        self._collect(0.0)
        return not any(w.ready and w.idle_since != self._wave for w in self._workers)

    def _end_stragglers(self) -> None:
        assert self._round is not None
        for worker in [w for w in self._workers if w.ready and w.idle_since != self._wave]:
            worker.kill("slower than server.round_timeout")


@dataclass
class _Round:
    groups: Sequence[Sequence[Request]]
    anew: bool
    """Whether workers may write over what they answered before."""
    causes: list[str] = field(default_factory=list)
    """Why workers died."""

    def __post_init__(self) -> None:
        self.left = len(self.groups)
        self._answers: list[list[Answer] | None] = [None] * len(self.groups)
        self._letter: Letter | None = None

    def settle(self, index: int, answers: list[Answer]) -> None:
        if self._answers[index] is None:
            self._answers[index] = answers
            self.left -= 1

    def letter(self, wave: int) -> Letter:
        """Return the message with all requests: each array once, however many clients get it."""
        if self._letter is None:
            data = Bytes()
            packed = [
                [
                    (r.node, r.message_type, pack(r.content, data), pack_kept(r.state, data))
                    for r in group
                ]
                for group in self.groups
            ]
            self._letter = Letter(wave, (self.anew, packed), data)
        return self._letter

    def results(self) -> list[list[Answer]]:
        cause = "; ".join(self.causes) or "unknown"
        return [
            answers or [Answer(None, f"its worker process died: {cause}", r.state) for r in group]
            for group, answers in zip(self.groups, self._answers, strict=True)
        ]

    def close(self) -> None:
        if self._letter is not None:
            self._letter.close()
