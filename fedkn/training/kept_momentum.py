"""The momentum that a client keeps from round to round (``train.keep_momentum``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fedkn.training.optimizer import FlatSGD
from fedkn.training.rule import LocalRule, Vectors, carried_part

if TYPE_CHECKING:
    from fedkn.training.local import LocalTask

__all__ = ["KeptMomentum"]

_MOMENTUM = "momentum/"


@dataclass(frozen=True)
class KeptMomentum(LocalRule):
    """A client goes on with the velocity of its last round, where otherwise it begins with zero.

    FixBN is published so (`fedkn.normalizers.fixbn`). Goes with any algorithm but those that
    normalize by the steps of one round, which their server half refuses.
    """

    alone: ClassVar[str] = "train.keep_momentum keeps a velocity for each of them"

    @property
    def carries(self) -> bool:
        """A velocity."""
        return True

    def begin(self, optimizer: FlatSGD, task: LocalTask) -> Vectors:
        """Put the velocity of the client's last round in place."""
        optimizer.restart(carried_part(task.carried, _MOMENTUM))
        return ()

    def end(
        self, optimizer: FlatSGD, task: LocalTask, steps: int, begun: Vectors
    ) -> dict[str, Tensor]:
        """Return the velocity as ``momentum/PARAMETER``; none before the first step of all."""
        del task, steps, begun
        velocity = optimizer.velocity()
        return {_MOMENTUM + name: value.clone() for name, value in velocity.items()}
