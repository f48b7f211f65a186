"""FedNova, the client half: plain local SGD, whose number of steps the server half divides by.

Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization", NeurIPS 2020, arXiv 2007.07481. A client takes FedAvg's steps and sends what FedAvg's
sends: how many steps they were is in every update's metrics. The server half is
`server/strategies/fednova.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedkn.training.rule import LocalRule

__all__ = ["FedNova", "step_weight"]


@dataclass(frozen=True)
class FedNova(LocalRule):
    """Adds nothing to local SGD: a round's update is then a sum of gradients of known weights."""


def step_weight(steps: int, momentum: float) -> float:
    """Return |a|, the sum of the weights with which a round's gradients enter the update.

    Plain SGD: the number of steps t. With momentum r (velocity v <- r v + g, from zero):
    (t - r (1 - r^t)/(1 - r))/(1 - r), arXiv 2007.07481, Section 4.1.
    """
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


RULE = FedNova
