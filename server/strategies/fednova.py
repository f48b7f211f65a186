"""FedNova, the server half: clients that take more local steps do not pull harder.

Wang et al., NeurIPS 2020, arXiv 2007.07481. The client half is `fedkn/algorithms/fednova.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedkn.algorithms.fednova import step_weight
from fedkn.averaging import weighted_sum
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from server.gate.screening import Update
from server.strategies.base import Arrays, Strategy

__all__ = ["FedNova"]


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
        ends = weighted_sum([update.arrays for update in updates], weights, sent)
        return {name: (1 - sum(weights)) * x + ends[name] for name, x in sent.items()}


STRATEGY = FedNova
