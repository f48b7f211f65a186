"""SCAFFOLD, the client half: a control variate corrects every step.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
arXiv 1910.06378, Algorithm 1, option II. The paper's steps have no momentum; with momentum they are
those of Flower's baseline niid_bench (`Scaffold`). The server half, with what it does to x and c,
is `server/strategies/scaffold.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fedkn.config import ExperimentConfig
from fedkn.training.optimizer import FlatSGD
from fedkn.training.rule import LocalRule, Vectors, carried_part

if TYPE_CHECKING:
    from fedkn.training.local import LocalTask

__all__ = ["Scaffold", "correction", "next_control"]

Tensors = Mapping[str, Tensor]

_CONTROL = "control/"


@dataclass(frozen=True)
class Scaffold(LocalRule):
    """Client i takes the steps y <- y - lr (g(y) - c_i + c) and keeps c_i+ (`next_control`).

    With momentum m the steps are v <- m v + g(y), y <- y - lr (v - c_i + c), v zero at first: the
    correction is no part of the velocity. c_i+ is then a mean of velocities, which are about
    1/(1 - m) gradients, and that is what corrects a step of a velocity.

    c, the server's control variate, comes beside the model (`LocalTask.given`), one tensor for each
    shared parameter; c_i never leaves the client. Parameters not shared are not corrected.
    """

    alone: ClassVar[str] = "scaffold corrects the gradients of each of them"

    controlled: bool = True
    """Whether there is a c: not where the clients share no parameter."""
    momentum: float = 0.0
    """Of the steps."""

    @classmethod
    def of(cls, told: Mapping[str, Any], given: Mapping[str, Tensor]) -> Self:
        """Return the rule for the c that is `given`."""
        del told
        return cls(bool(given))

    def on(self, config: ExperimentConfig, model: nn.Module) -> Self:
        """Return the rule with the momentum of `config`."""
        del model
        return replace(self, momentum=config.train.momentum)

    @property
    def acts(self) -> bool:
        """Whether there is anything to correct."""
        return self.controlled

    @property
    def carries(self) -> bool:
        """c_i, where there is a c."""
        return self.controlled

    def begin(self, optimizer: FlatSGD, task: LocalTask) -> Vectors:
        """Return c - c_i and x, the model as it was received; put c - c_i into the velocity."""
        if not self.controlled:
            return ()
        shared = correction(task.given, carried_part(task.carried, _CONTROL))
        named = optimizer.named(torch.zeros_like(optimizer.values))
        shift = optimizer.flat(named | shared)
        if self.momentum:
            # There it stays, m of it left over from the last step and 1 - m of it added by each.
            optimizer.restart(optimizer.named(shift))
        return shift, optimizer.values.clone()

    def correct(self, values: Tensor, gradients: Tensor, *begun: Tensor) -> None:
        """Add of c - c_i what the velocity has lost of it."""
        gradients.add_(begun[0], alpha=1 - self.momentum)

    def end(
        self, optimizer: FlatSGD, task: LocalTask, steps: int, begun: Vectors
    ) -> dict[str, Tensor]:
        """Return c_i+ as ``control/PARAMETER``."""
        if not self.controlled:
            return {}
        following = next_control(
            carried_part(task.carried, _CONTROL),
            task.given,
            optimizer.named(begun[1]),
            optimizer.named(optimizer.values),
            steps=steps,
            learning_rate=task.learning_rate,
        )
        return {_CONTROL + name: value for name, value in following.items()}


def correction(control_server: Tensors, control_client: Tensors) -> dict[str, Tensor]:
    """Return c - c_i by parameter, which every step adds to its gradient.

    arXiv 1910.06378, Eq. 3. A client that has no c_i begins with zero.
    """
    return {
        name: value - control_client.get(name, torch.zeros_like(value))
        for name, value in control_server.items()
    }


def next_control(
    control_client: Tensors,
    control_server: Tensors,
    received: Tensors,
    trained: Tensors,
    *,
    steps: int,
    learning_rate: float,
) -> dict[str, Tensor]:
    """Return c_i+ = c_i - c + (x - y)/(K lr) by parameter, for each of `control_server`.

    arXiv 1910.06378, Eq. 4, option II: x is `received`, y is `trained`, K is `steps`. Without a
    step c_i stays. Computed in float64, as the server does, where the tensors lie, all on one
    device, and returned in the dtypes of c.
    """
    following: dict[str, Tensor] = {}
    for name, c in control_server.items():
        own = control_client.get(name, torch.zeros_like(c))
        if not steps:
            following[name] = own
            continue
        moved = received[name].detach().double() - trained[name].detach().double()
        gradient = moved / (steps * learning_rate)
        following[name] = (own.double() - c.double() + gradient).to(c.dtype)
    return following


RULE = Scaffold
