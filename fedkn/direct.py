"""A client's training asked for and answered on one machine: values and tensors, no messages.

What a message is for does not arise between two functions of one process, or of one machine: the
tensors stay where they are, end to end, and numbers are numbers. What is asked and what is answered
are the same as in messages (`fedkn.federation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from fedkn.data.summary import DataSummary
from fedkn.stack import Flat

__all__ = ["Asked", "Trained"]


@dataclass(frozen=True, eq=False)
class Asked:
    """What a client is asked: the config of a message, the experiment's data, the tensors.

    `control`: what the strategy sends beside the model; None: nothing.
    """

    told: dict[str, Any]
    data: DataSummary
    sent: Flat
    control: Flat | None = None

    def copied(self) -> Self:
        """Return a copy whose values are the client's own; of the tensors it takes one itself."""
        told = {key: list(v) if isinstance(v, list) else v for key, v in self.told.items()}
        return replace(self, told=told)


@dataclass(frozen=True, eq=False)
class Trained:
    """An update: its metrics, and the tensors in the layout of those that were sent.

    Tensors of other names, shapes or dtypes, which somebody's own rule may send, are by name: they
    are for the gate to refuse.
    """

    metrics: dict[str, int | float]
    tensors: Flat | Mapping[str, Tensor]
