"""FedNova: clients that take more local steps do not pull harder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from server.gate.screening import Update
from server.strategies.base import Arrays, Strategy, weighted_sum

__all__ = ["FedNova", "step_weight"]


class FedNova(Strategy):
    """Normalized averaging (arXiv 2007.07481, Eq. 8 to 10).

    With p_i the client's part of the updates' examples, as in the paper, and |a_i| its
    `step_weight`,

        x <- x + lr_g t sum_i p_i (y_i - x)/|a_i|,    t = sum_i p_i |a_i|.

    t is the effective number of steps that FedAvg takes, so that with equal |a_i| this is FedAvg.
    The number of local steps is in the update's metrics; clients send nothing more than FedAvg's.

    Raises:
        UserError: with ``train.keep_momentum``: |a_i| is of a momentum that begins at zero.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        if config.train.keep_momentum:
            raise UserError(
                "fednova needs train.keep_momentum = false: it normalizes by the steps of one round"
            )
        rate = config.strategy.server_learning_rate
        self._rate = 1.0 if rate == "default" else rate
        self._momentum = config.train.momentum

    def aggregate(
        self, round_: int, sent: Arrays, updates: Sequence[Update]
    ) -> dict[str, np.ndarray]:
        """Return x after the round."""
        del round_
        total = sum(update.metrics["num-examples"] for update in updates)
        parts = [update.metrics["num-examples"] / total for update in updates]
        sizes = [step_weight(int(u.metrics["steps"]), self._momentum) for u in updates]
        effective = sum(part * size for part, size in zip(parts, sizes, strict=True))
        weights = [
            self._rate * effective * part / size for part, size in zip(parts, sizes, strict=True)
        ]
        ends = weighted_sum(updates, weights, sent)
        return {name: (1 - sum(weights)) * x + ends[name] for name, x in sent.items()}


def step_weight(steps: int, momentum: float) -> float:
    """Return |a|, the sum of the weights with which a round's gradients enter the update.

    Plain SGD: the number of steps t. With momentum r (velocity v <- r v + g, from zero):
    (t - r (1 - r^t)/(1 - r))/(1 - r), arXiv 2007.07481, Section 4.1.
    """
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
