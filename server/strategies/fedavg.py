"""FedAvg, the server half: the mean by examples (its client half: `fedkn/algorithms/fedavg.py`).

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, arXiv 1602.05629, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from fedkn.averaging import weighted_mean
from fedkn.federation import EXAMPLES
from server.gate.screening import Update
from server.strategies.base import Arrays, Strategy

__all__ = ["FedAvg"]


class FedAvg(Strategy):
    """w <- sum_k (n_k / n) w_k, with n_k the examples of client k and n those of the round."""

    is_plain_mean: ClassVar[bool] = True

    def aggregate(
        self, round_: int, sent: Arrays, updates: Sequence[Update]
    ) -> dict[str, np.ndarray]:
        """Return the mean."""
        del round_
        examples = [update.metrics[EXAMPLES] for update in updates]
        return weighted_mean([update.arrays for update in updates], examples, sent)


STRATEGY = FedAvg
