"""Ditto, the client half: a model of its own on every client, held near the global one.

Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, arXiv
2012.04221, Algorithm 1: the client trains the global model as FedAvg's does, and its own model v by

    v <- v - lr (g(v) + lambda (v - w)),

w the global model as it was received. v begins as the first w and never leaves the client. The
server half (`server/strategies/ditto.py`) averages as FedAvg's does, and tells lambda.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from fedkn.errors import UserError
from fedkn.training.optimizer import FlatSGD
from fedkn.training.rule import LocalRule, Vectors

if TYPE_CHECKING:
    from fedkn.training.local import LocalTask

__all__ = ["LAMBDA", "Ditto"]

LAMBDA = "ditto-lambda"
"""What the server tells: the weight of the term that holds a client's model near the global one."""


@dataclass(frozen=True)
class _Held(LocalRule):
    """Adds weight/2 ||v - w||² to the loss, w the global model, which it is given.

    Parameters that are not shared, of which there is no global one, are not held.
    """

    weight: float = 0.0

    @property
    def acts(self) -> bool:
        """Whether the term weighs anything."""
        return self.weight != 0

    def begin(self, optimizer: FlatSGD, task: LocalTask) -> Vectors:
        """Return w, and the weight of each number."""
        if not self.acts:
            return ()
        own = optimizer.named(optimizer.values)
        given = {name: task.given.get(name, value).to(value) for name, value in own.items()}
        weights = optimizer.values.clone().zero_()
        for name, part in optimizer.named(weights).items():
            part.fill_(self.weight if name in task.given else 0.0)
        return optimizer.flat(given), weights

    def gradient(self, values: Tensor, gradients: Tensor, *begun: Tensor) -> None:
        """Add the term's gradient, weight (v - w)."""
        anchor, weights = begun
        gradients.addcmul_(weights, values).addcmul_(weights, anchor, value=-1.0)


@dataclass(frozen=True)
class Ditto(LocalRule):
    """Local SGD on the global model; then the client's own is trained by `_Held`, and kept."""

    alone: ClassVar[str] = "ditto trains a second model for each of them"
    keeps_model: ClassVar[bool] = True

    weight: float = 0.0

    @classmethod
    def of(cls, told: Mapping[str, Any], given: Mapping[str, Tensor]) -> Self:
        """Return the rule with the lambda that the server tells."""
        del given
        weight = told.get(LAMBDA)
        if not isinstance(weight, float):
            raise UserError(f"the server's message has no float '{LAMBDA}'")
        return cls(weight)

    @property
    def carries(self) -> bool:
        """The client's own model."""
        return True

    @property
    def own(self) -> LocalRule:
        """Hold it near the global one."""
        return _Held(self.weight)


RULE = Ditto
