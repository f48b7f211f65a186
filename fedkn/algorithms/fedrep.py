"""FedRep, the client half: first the client's own head is trained, then the shared body.

Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021,
arXiv 2102.07078, Algorithm 1: with the body as received, the head takes its steps; with the head as
it then is, the body takes its. The body is sent. The server half (`server/strategies/fedrep.py`)
averages as FedAvg's does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from fedkn.algorithms.fedper import personal_parameters
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.training.optimizer import FlatSGD
from fedkn.training.rule import LocalRule, Vectors

if TYPE_CHECKING:
    from fedkn.training.local import LocalTask

__all__ = ["HEAD_EPOCHS", "FedRep"]

HEAD_EPOCHS = "head-epochs"
"""What the server tells: how often the head is trained on all examples before the body is."""


@dataclass(frozen=True)
class _Part(LocalRule):
    """Moves some parameters alone: to the others no gradient is left, nor weight decay."""

    alone: ClassVar[str] = "fedrep trains two parts of each of them in turn"

    moved: frozenset[str] = frozenset()

    @property
    def acts(self) -> bool:
        """Always."""
        return True

    def begin(self, optimizer: FlatSGD, task: LocalTask) -> Vectors:
        """Return 1 for what is moved, 0 for what is not."""
        del task
        mask = optimizer.values.clone().zero_()
        for name, part in optimizer.named(mask).items():
            part.fill_(float(name in self.moved))
        return (mask,)

    def gradient(self, values: Tensor, gradients: Tensor, *begun: Tensor) -> None:
        """Take the others' gradients away, so that they count in no norm."""
        gradients.mul_(begun[0])

    def correct(self, values: Tensor, gradients: Tensor, *begun: Tensor) -> None:
        """Take the others' weight decay away."""
        gradients.mul_(begun[0])


@dataclass(frozen=True)
class FedRep(_Part):
    """Local SGD on the body, after a pass of `head_epochs` on the head (`personal_parameters`)."""

    head_epochs: int = 1
    head: frozenset[str] = frozenset()

    @classmethod
    def of(cls, told: Mapping[str, Any], given: Mapping[str, Tensor]) -> Self:
        """Return the rule with the epochs that the server tells."""
        del given
        epochs = told.get(HEAD_EPOCHS)
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            raise UserError(f"the server's message has no whole number '{HEAD_EPOCHS}'")
        return cls(head_epochs=epochs)

    @classmethod
    def stays(cls, config: ExperimentConfig, model: nn.Module) -> frozenset[str]:
        """Return the parameters of the head."""
        return personal_parameters(config, model)

    def on(self, config: ExperimentConfig, model: nn.Module) -> Self:
        """Return the rule for the head and the body of `model`."""
        head = personal_parameters(config, model)
        body = frozenset(name for name, _ in model.named_parameters() if name not in head)
        return replace(self, moved=body, head=head)

    @property
    def prelude(self) -> tuple[LocalRule, int]:
        """Train the head."""
        return _Part(moved=self.head), self.head_epochs


RULE = FedRep
