"""FedProx, the client half: a term that holds clients near the global model.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv 1812.06127, Eq. 2.
The server half (`server/strategies/fedprox.py`) averages as FedAvg's does, and tells the term's
weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from fedkn.errors import UserError
from fedkn.training.optimizer import FlatSGD
from fedkn.training.rule import LocalRule, Vectors

if TYPE_CHECKING:
    from fedkn.training.local import LocalTask

__all__ = ["MU", "FedProx"]

MU = "proximal-mu"
"""What the server tells: the weight of the term, under Flower's name."""


@dataclass(frozen=True)
class FedProx(LocalRule):
    """The loss is F(w) + mu/2 ||w - w_g||², with w_g the global model as it was received."""

    mu: float

    @classmethod
    def of(cls, told: Mapping[str, Any], given: Mapping[str, Tensor]) -> Self:
        """Return the rule with the weight that the server tells; 0 where it tells none."""
        del given
        mu = told.get(MU, 0.0)
        if not isinstance(mu, float):
            raise UserError(f"the server's message has no float '{MU}'")
        return cls(mu)

    @property
    def acts(self) -> bool:
        """Whether the term weighs anything."""
        return self.mu != 0

    def begin(self, optimizer: FlatSGD, task: LocalTask) -> Vectors:
        """Return w_g."""
        del task
        return (optimizer.values.clone(),) if self.acts else ()

    def gradient(self, values: Tensor, gradients: Tensor, *begun: Tensor) -> None:
        """Add the term's gradient, mu (w - w_g)."""
        (anchor,) = begun
        gradients.add_(values, alpha=self.mu).sub_(anchor, alpha=self.mu)

    def stacked(self, values: list[Tensor], gradients: list[Tensor], begun: list[Tensor]) -> None:
        """Add mu (w - w_g) of every client."""
        if self.acts:
            torch._foreach_add_(gradients, torch._foreach_sub(values, begun), alpha=self.mu)


RULE = FedProx
