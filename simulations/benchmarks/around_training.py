"""What a round costs beside its training, in processor time.

``python -m simulations.benchmarks.around_training`` prints it for three set-ups, and followed by
names of strategies, or of mechanisms of clients' privacy, for the largest set-up with each of them.

Training is replaced by a change of the tensors, which is not counted. One process, no workers.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

from torch import Tensor

from clients.session import Session
from clients.trainer import SequentialTrainer, Trained, Wanted
from fedkn.training import LocalTask, LocalUpdate
from simulations.benchmarks.engine_tasks import TASKS, Task, prepared
from simulations.engines import local_host
from simulations.engines.run import run_experiment

__all__ = ["milliseconds"]

ValueT = TypeVar("ValueT")

_PFL = {"cohort": 50, "train.batch_size": 10, "train.learning_rate": 0.1}
_LARGEST = Task("pfl-research's", 1000, 50, 12, _PFL)
_SETUPS = {
    "small": TASKS["small"],
    "fixed": TASKS["fixed"],
    "1,000 clients x 50, cohort 50, batch 10": _LARGEST,
}


def milliseconds(task: Task, engine: str, rounds: int) -> float:
    """Return the processor time of a round without its training, the median one, in ms."""
    marks: list[float] = []
    uncounted = 0.0

    def uncounting(call: Callable[[], ValueT]) -> ValueT:
        nonlocal uncounted
        started = time.process_time()
        try:
            return call()
        finally:
            uncounted += time.process_time() - started

    def one(
        trainer: SequentialTrainer,
        session: Session,
        task: LocalTask,
        received: Mapping[str, Tensor],
    ) -> Trained:
        del trainer

        def call() -> Trained:
            session.workspace.load(received)
            state = session.workspace.state()
            for value in state.values():
                value.mul_(_factor(task))
            return _update(), state

        return uncounting(call)

    def several(wanted: Sequence[Wanted]) -> Sequence[Trained]:
        return uncounting(
            lambda: [
                (_update(), {name: v * _factor(w.task) for name, v in w.received.items()})
                for w in wanted
            ]
        )

    class Rounds(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("round ") and "updates" in record.getMessage():
                marks.append(time.process_time() - uncounted)

    logger, heard = logging.getLogger("flwr"), Rounds()
    logger.addHandler(heard)
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            patch.object(SequentialTrainer, "train", one),
            patch.object(local_host, "train_together", several),
        ):
            config = prepared(task, Path(folder))
            run_experiment(config.overlay(workers=1, rounds=rounds, engine=engine))
    finally:
        logger.removeHandler(heard)
    return 1e3 * statistics.median(b - a for a, b in pairwise(marks))


def _factor(task: LocalTask) -> float:
    """Return what the tensors of a client are multiplied by: clients differ a little."""
    return 1 + 1e-4 * (task.client % 7)


def _update() -> LocalUpdate:
    return LocalUpdate(
        examples=50, steps=5, skipped_batches=0, skipped_examples=0, loss=2.0, seconds=0.01
    )


def _with(name: str) -> Task:
    """Return the largest set-up with the strategy, or the mechanism of privacy, of this `name`."""
    private = name.startswith(("server_", "client_"))
    change = {"privacy.mechanism": name} if private else {"strategy.name": name}
    return replace(_LARGEST, settings={**_PFL, **change})


if __name__ == "__main__":
    asked = {name: _with(name) for name in sys.argv[1:]}
    for title, setup in (asked or _SETUPS).items():
        for name in ("inprocess",) if asked else ("inprocess", "batched"):
            found = milliseconds(setup, name, 40 if setup.clients == 100 else 12)
            sys.stdout.write(f"{title}, {name}: {found:.1f} ms\n")
            sys.stdout.flush()
