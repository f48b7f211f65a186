"""What trains beneath the ClientApp: a client asks for passes, and whoever runs it trains.

What a client does before, between and after its passes is the same code whatever trains.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from clients.device.profile import is_out_of_memory
from clients.session import Session
from fedkn.errors import UserError
from fedkn.training import LocalTask, LocalUpdate, train_locally, train_privately

__all__ = ["Passes", "SequentialTrainer", "Trained", "Wanted", "alone"]

_LOG = logging.getLogger("flwr")

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, eq=False)
class Wanted:
    """A pass over its examples that a client asks for, from the tensors that it `received`.

    Tensors of the model that were not received start as initialised.
    """

    session: Session
    task: LocalTask
    received: Mapping[str, Tensor]


Trained = tuple[LocalUpdate, Mapping[str, Tensor]]
"""What came of a pass, and all of the model's tensors by name, valid until the next pass of the
session. It is a function of what was wanted and of the client's data alone."""

Passes = Generator[Wanted, Trained, ResultT]
"""What a client does in a round: it yields the passes that it wants, and is sent what came of them.
So whoever runs it trains, this client by itself or several together."""


class SequentialTrainer:
    """Trains at once, in the session's workspace: one client after another."""

    def train(
        self, session: Session, task: LocalTask, received: Mapping[str, Tensor]
    ) -> tuple[LocalUpdate, Mapping[str, Tensor]]:
        """Train by `train_locally`; on a device in smaller batches where memory runs out.

        A device then halves its batch and starts again from what was received, until the update
        is made; `LocalUpdate.batch_size` says with which batches. A step accumulates as many of
        them as it takes for the same examples.

        Raises:
            UserError: memory does not suffice for the smallest batch of the normalizer.
        """
        least = session.normalizer.minimum_batch
        while (update := _attempt(session, task, received)) is None:
            # No batch is larger than what the client holds.
            largest = task.largest_batch or task.train.batch_size
            size = min(largest, task.train.batch_size, len(session.parts[task.client]))
            if _is_private(session):
                size = 1
            if size // 2 < least:
                raise UserError(
                    f"this device's memory does not suffice for a step on {size} image(s): "
                    "close other programs, or choose a smaller model"
                )
            _LOG.warning("out of memory at batch size %d: trying %d", size, size // 2)
            task = replace(task, largest_batch=size // 2)
        if 0 < task.largest_batch < task.train.batch_size:
            update = replace(update, batch_size=task.largest_batch)
        return update, session.workspace.state()


def alone(passes: Passes[ResultT]) -> ResultT:
    """Train a client by itself, pass after pass, and return what it comes to."""
    trainer = SequentialTrainer()
    try:
        wanted = next(passes)
        while True:
            wanted = passes.send(trainer.train(wanted.session, wanted.task, wanted.received))
    except StopIteration as end:
        result: ResultT = end.value
        return result


def _is_private(session: Session) -> bool:
    """Whether images go through the model one at a time, in whatever batches."""
    return session.config.privacy.mechanism == "example"


def _attempt(
    session: Session, task: LocalTask, received: Mapping[str, Tensor]
) -> LocalUpdate | None:
    """Return the update, or None if a device ran out of memory."""
    session.workspace.load(received)
    examples, targets = session.client_data(task.client)
    private = partial(train_privately, privacy=session.config.privacy)
    train = private if _is_private(session) else train_locally
    try:
        return train(
            session.workspace,
            examples,
            targets,
            task,
            inputs=session.inputs,
            normalizer=session.normalizer,
        )
    except (RuntimeError, MemoryError) as error:
        # A simulation that changed its batches would compare what was not asked for.
        if session.profile is None or not is_out_of_memory(error):
            raise
        return None
