"""Training that only changes the tensors a little, to measure what goes on beside it.

``python -m simulations.benchmarks.idle_training`` is a worker process that trains so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar
from unittest.mock import patch

from torch import Tensor

from clients.session import Session
from clients.trainer import SequentialTrainer, Trained, Wanted
from fedkn.training import LocalTask, LocalUpdate
from fedkn.training.rule import BegunRules
from simulations.engines import local_host, worker

__all__ = ["REST", "idle_training"]

ValueT = TypeVar("ValueT")


@contextmanager
def idle_training(seconds: float = 0.0) -> Iterator[None]:
    """Inside the block replace training by a change of the tensors that leaves no trace of itself.

    An update's ``train-seconds`` are then the processor time that this took: what else a round
    takes is not training. What rules carry from round to round they carry.

    Args:
        seconds: how long a client's pass is at rest, for processes to share clients as they do
            when they train.
    """
    unreported = 0.0

    def apart(call: Callable[[], ValueT], passes: int) -> ValueT:
        nonlocal unreported
        started = time.process_time()
        try:
            return call()
        finally:
            unreported += time.process_time() - started
            if seconds:
                time.sleep(seconds * passes)

    def update(carried: Mapping[str, Tensor]) -> LocalUpdate:
        return LocalUpdate(
            examples=1,
            steps=1,
            skipped_batches=0,
            skipped_examples=0,
            loss=2.0,
            seconds=0.0,
            carried=carried,
        )

    def timed(one: LocalUpdate) -> LocalUpdate:
        nonlocal unreported
        one.__dict__["seconds"], unreported = unreported, 0.0
        return one

    def single(
        trainer: SequentialTrainer,
        session: Session,
        task: LocalTask,
        received: Mapping[str, Tensor],
    ) -> Trained:
        del trainer

        def call() -> Trained:
            workspace = session.workspace
            workspace.load(received)
            rules = BegunRules(workspace.optimizer, task)
            state = workspace.state()
            for value in state.values():
                if value.is_floating_point():
                    value.mul_(_factor(task))
            workspace.optimizer.started = True
            return update(rules.end(1)), state

        found, state = apart(call, 1)
        return timed(found), state

    def several(wanted: Sequence[Wanted]) -> Sequence[Trained]:
        def call() -> list[Trained]:
            return [
                (update({}), {name: v * _factor(w.task) for name, v in w.received.items()})
                for w in wanted
            ]

        return [(timed(found), state) for found, state in apart(call, len(wanted))]

    with (
        patch.object(SequentialTrainer, "train", single),
        patch.object(local_host, "train_together", several),
        patch.object(worker, "_MODULE", _NAME),
    ):
        yield


def _factor(task: LocalTask) -> float:
    """Return what the tensors of a client are multiplied by: clients differ a little."""
    return 1 + 1e-4 * (task.client % 7)


_NAME = "simulations.benchmarks.idle_training"

REST = 0.004
"""Seconds that a client's pass is at rest where there are workers."""

if __name__ == "__main__":
    with idle_training(REST):
        worker.work(int(sys.argv[1]), int(sys.argv[2]))
