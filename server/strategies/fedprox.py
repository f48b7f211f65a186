"""FedProx, the server half: FedAvg's mean; it tells clients how much their term weighs.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, arXiv 1812.06127. The
term is the client half's (`fedkn/algorithms/fedprox.py`).
"""

from __future__ import annotations

from flwr.app import ConfigRecord

from fedkn.algorithms.fedprox import MU
from fedkn.config import ExperimentConfig
from server.strategies.base import Arrays
from server.strategies.fedavg import FedAvg

__all__ = ["FedProx"]


class FedProx(FedAvg):
    """The mean by examples, of clients that train by the loss F(w) + mu/2 ||w - w_g||²."""

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        self._mu = config.strategy.proximal_mu

    def instructions(self, round_: int, parameters: Arrays, config: ConfigRecord) -> ConfigRecord:
        """Return `config` with mu."""
        del round_, parameters
        return ConfigRecord({**config, MU: self._mu})


STRATEGY = FedProx
