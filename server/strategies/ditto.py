"""Ditto, the server half: FedAvg's mean of the global model; it tells clients lambda.

Li et al., ICML 2021, arXiv 2012.04221. The clients' own models are the client half's
(`fedkn/algorithms/ditto.py`).
"""

from __future__ import annotations

from flwr.app import ConfigRecord

from fedkn.algorithms.ditto import LAMBDA
from fedkn.config import ExperimentConfig
from server.strategies.base import Arrays
from server.strategies.personal import PersonalMean

__all__ = ["Ditto"]


class Ditto(PersonalMean):
    """The mean by examples; the paper lets the global model be made in any way.

    Raises:
        UserError: with DP-SGD, whose account knows of one model.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self._weight = config.strategy.personal_weight

    def instructions(self, round_: int, parameters: Arrays, config: ConfigRecord) -> ConfigRecord:
        """Return `config` with lambda."""
        del round_, parameters
        return ConfigRecord({**config, LAMBDA: self._weight})


STRATEGY = Ditto
