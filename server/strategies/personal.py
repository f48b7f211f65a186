"""The mean of strategies under which every client ends with a model of its own."""

from __future__ import annotations

from typing import ClassVar

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from server.strategies.fedavg import FedAvg

__all__ = ["PersonalMean"]


class PersonalMean(FedAvg):
    """FedAvg's mean of what the clients share; what they keep is their client half's.

    With privacy of clients it is refused: nobody has looked at what the noise does to their models.

    Raises:
        UserError: with DP-SGD, where clients train more than what they send (`more_passes`).
    """

    is_plain_mean: ClassVar[bool] = False
    more_passes: ClassVar[bool] = True

    def __init__(self, config: ExperimentConfig) -> None:
        super().__init__(config)
        if self.more_passes and config.privacy.mechanism == "example":
            raise UserError(
                f"{config.strategy.name} trains on a client's examples more than once in a round, "
                "which privacy.mechanism = 'example' does not account for: set strategy.name = "
                "'fedavg' or 'fedper', or privacy.mechanism = 'none'"
            )
