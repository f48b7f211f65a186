"""APFL, the server half: FedAvg's mean of the clients' copies; it tells how mixtures begin.

Deng, Kamani & Mahdavi, 2020, arXiv 2003.13461. The clients' own models are the client half's
(`fedkn/algorithms/apfl.py`).
"""

from __future__ import annotations

from flwr.app import ConfigRecord

from fedkn.algorithms.apfl import ADAPTIVE, MIXTURE
from fedkn.config import ExperimentConfig
from server.strategies.base import Arrays
from server.strategies.personal import PersonalMean

__all__ = ["APFL"]


class APFL(PersonalMean):
    """The mean by examples (the paper's is uniform).

    Raises:
        UserError: with DP-SGD, whose account knows of one model.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self._told = {
            MIXTURE: config.strategy.mixture,
            ADAPTIVE: config.strategy.adaptive_mixture,
        }

    def instructions(self, round_: int, parameters: Arrays, config: ConfigRecord) -> ConfigRecord:
        """Return `config` with the mixture's beginning."""
        del round_, parameters
        return ConfigRecord({**config, **self._told})


STRATEGY = APFL
