"""What trains beneath the ClientApp: the one place where an engine may put its own way.

The ClientApp's messages, replies and reports are the same code whatever trains.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Protocol

from torch import Tensor

from clients.device.profile import is_out_of_memory
from clients.session import Session
from fedkn.errors import UserError
from fedkn.training import LocalTask, LocalUpdate, train_locally, train_privately

__all__ = ["SequentialTrainer", "Trainer", "current_trainer", "use_trainer"]

_LOG = logging.getLogger("flwr")


class Trainer(Protocol):
    """Trains one client of a session."""

    def train(
        self, session: Session, task: LocalTask, received: Mapping[str, Tensor]
    ) -> tuple[LocalUpdate, Mapping[str, Tensor]]:
        """Train client ``task.client`` from the `received` tensors.

        Tensors of the model that were not received start as initialised. Return what came of it,
        and all of the model's tensors by name, valid until the next client of the session trains.
        The result is a function of the arguments and the client's data alone.
        """


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


def current_trainer() -> Trainer:
    """Return the trainer in use: sequential, unless an engine has put in another."""
    return _trainer.get(None) or _SEQUENTIAL


@contextmanager
def use_trainer(trainer: Trainer) -> Iterator[None]:
    """Let the ClientApp train by `trainer` inside the block (of this thread)."""
    token = _trainer.set(trainer)
    try:
        yield
    finally:
        _trainer.reset(token)


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


_SEQUENTIAL = SequentialTrainer()
_trainer: ContextVar[Trainer] = ContextVar("trainer")
