"""FedRep, the server half: FedAvg's mean of the clients' bodies.

Collins et al., ICML 2021, arXiv 2102.07078. The client half, which trains head and body in turn, is
`fedkn/algorithms/fedrep.py`.
"""

from __future__ import annotations

from flwr.app import ConfigRecord

from fedkn.algorithms.fedrep import HEAD_EPOCHS
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from server.strategies.base import Arrays
from server.strategies.personal import PersonalMean

__all__ = ["FedRep"]


class FedRep(PersonalMean):
    """The mean by examples (the paper's is uniform, over clients of equal size).

    Raises:
        UserError: with DP-SGD, or with ``train.keep_momentum``: it would move what stands still.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        if config.train.keep_momentum:
            raise UserError(
                "fedrep needs train.keep_momentum = false: a kept velocity would move the head "
                "while the body is trained"
            )
        self._epochs = config.strategy.head_epochs

    def instructions(self, round_: int, parameters: Arrays, config: ConfigRecord) -> ConfigRecord:
        """Return `config` with the head's epochs."""
        del round_, parameters
        return ConfigRecord({**config, HEAD_EPOCHS: self._epochs})


STRATEGY = FedRep
