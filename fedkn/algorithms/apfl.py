"""APFL, the client half: a mixture of a client's own model and its copy of the global one.

Deng, Kamani & Mahdavi, "Adaptive Personalized Federated Learning", 2020, arXiv 2003.13461,
Algorithm 1. On the batch of every local step, with w the client's copy of the global model, v its
own, and the mixture m = a v + (1 - a) w:

    v <- v - lr a g(m)        w <- w - lr g(w)        a <- a - lr <v - w, g(m)>   (eq. 10)

w is sent and averaged; v and a stay, and m is the client's personalized model. The server half
(`server/strategies/apfl.py`) averages as FedAvg's does, and tells where a begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.training.optimizer import FlatSGD
from fedkn.training.rule import OWN_MODEL, AsideStep, LocalRule, Vectors, carried_part

if TYPE_CHECKING:
    from fedkn.training.local import LocalTask

__all__ = ["ADAPTIVE", "APFL", "MIXTURE"]

MIXTURE = "apfl-mixture"
"""What the server tells: the a with which a client begins."""
ADAPTIVE = "apfl-adaptive"
"""What the server tells: whether a client learns its a."""

_OWN = "apfl/v/"
_MIXTURE = "apfl/a"


@dataclass(frozen=True)
class APFL(LocalRule):
    """Local SGD on w; beside every step one of v, and, with `adaptive`, one of a, within [0, 1].

    v begins as the first w that the client receives. v's gradient is clipped as w's is, and has
    weight decay and momentum of its own, which begins anew in every round. Where g(m) is clipped
    for v, it is for a too.
    """

    alone: ClassVar[str] = "apfl trains a second model beside each step of theirs"
    keeps_model: ClassVar[bool] = True

    mixture: float = 0.5
    adaptive: bool = True

    @classmethod
    def of(cls, told: Mapping[str, Any], given: Mapping[str, Tensor]) -> Self:
        """Return the rule with what the server tells."""
        del given
        mixture, adaptive = told.get(MIXTURE), told.get(ADAPTIVE)
        if not isinstance(mixture, float) or not isinstance(adaptive, bool):
            raise UserError(f"the server's message lacks '{MIXTURE}' or '{ADAPTIVE}'")
        return cls(mixture, adaptive)

    @classmethod
    def stays(cls, config: ExperimentConfig, model: nn.Module) -> frozenset[str]:
        """Return nothing: all parameters are shared.

        Raises:
            UserError: the model has statistics, of which a mixture has no meaning.
        """
        if buffer := next((name for name, _ in model.named_buffers()), None):
            raise UserError(
                f"apfl mixes parameters, and the '{config.normalizer.name}' normalizer keeps "
                f"'{buffer}' beside them: set normalizer.name to one without statistics, such as "
                "'kernel' or 'group', or strategy.name = 'ditto'"
            )
        return frozenset()

    @property
    def acts(self) -> bool:
        """Always."""
        return True

    @property
    def carries(self) -> bool:
        """v, a and m."""
        return True

    def begin(self, optimizer: FlatSGD, task: LocalTask) -> Vectors:
        """Return v, its velocity, and a, in a vector of one number."""
        values = optimizer.values
        kept = carried_part(task.carried, _OWN)
        named = optimizer.named(values)
        own = optimizer.flat({name: kept.get(name, value) for name, value in named.items()})
        mixture = task.carried.get(_MIXTURE, torch.tensor([self.mixture]))
        return own, torch.zeros_like(values), mixture.to(values, copy=True)

    def aside(self, step: AsideStep, *begun: Tensor) -> None:
        """Take a step of v and of a, by the gradient at the mixture."""
        own, velocity, mixture = begun
        optimizer, train, rate = step.optimizer, step.train, step.learning_rate
        copy = optimizer.values.clone()
        with torch.no_grad():
            optimizer.values.copy_(_mixed(own, copy, mixture))
        step.differentiate()
        with torch.no_grad():
            optimizer.values.copy_(copy)
            optimizer.limit(clip_norm=train.clip_norm, weight_decay=0.0)
            gradient = optimizer.gradients
            slope = torch.dot(own - copy, gradient)
            direction = (mixture * gradient).add_(own, alpha=train.weight_decay)
            velocity.mul_(train.momentum).add_(direction)
            own.add_(velocity, alpha=-rate)
            if self.adaptive:
                mixture.sub_(rate * slope).clamp_(0.0, 1.0)

    def end(
        self, optimizer: FlatSGD, task: LocalTask, steps: int, begun: Vectors
    ) -> dict[str, Tensor]:
        """Return v, a and the client's personalized model m."""
        del task, steps
        own, _, mixture = begun
        mixed = optimizer.named(_mixed(own, optimizer.values, mixture))
        kept = {_OWN + name: value.clone() for name, value in optimizer.named(own).items()}
        kept |= {OWN_MODEL + name: value.clone() for name, value in mixed.items()}
        return kept | {_MIXTURE: mixture}


def _mixed(own: Tensor, copy: Tensor, mixture: Tensor) -> Tensor:
    return mixture * own + (1 - mixture) * copy


RULE = APFL
