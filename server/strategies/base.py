"""What a strategy is to the server: from the updates' shared parameters to the next ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from flwr.app import ConfigRecord

from fedkn.config import ExperimentConfig
from server.gate.screening import Update

__all__ = ["Arrays", "NoAggregate", "Strategy"]

Arrays = Mapping[str, np.ndarray]


class NoAggregate(Exception):
    """The strategy makes nothing usable of these updates; the text is the reason."""


class Strategy(ABC):
    """Aggregates the shared parameters of a model; of other tensors it knows nothing.

    The server half of an algorithm, whose client half is the `LocalRule` of the same name in
    fedkn/algorithms/, or FedAvg's where there is none.
    """

    is_plain_mean: ClassVar[bool] = False
    """Whether the next parameters are the updates' plain mean: the noise of client-level privacy is
    calibrated to what one client moves that."""

    def __init__(self, config: ExperimentConfig) -> None:
        """Be configured; a subclass raises UserError for settings that do not go with it."""
        del config

    def instructions(self, round_: int, parameters: Arrays, config: ConfigRecord) -> ConfigRecord:
        """Return `config` with what the clients need to know in this round."""
        del round_, parameters
        return config

    def control(self, parameters: Arrays) -> dict[str, np.ndarray]:
        """Return what is sent beside the `parameters`, in their shapes and dtypes; most send none.

        It is what the client half is given (`fedkn.training.rule.LocalRule.of`).
        """
        del parameters
        return {}

    @abstractmethod
    def aggregate(
        self, round_: int, sent: Arrays, updates: Sequence[Update]
    ) -> Mapping[str, np.ndarray]:
        """Return the next parameters, of the names and shapes of `sent` and any float dtype.

        `updates` passed the gate; there is at least one, and they are sorted by partition.

        Raises:
            NoAggregate: too few of them. The state may then be anything.
        """

    def state(self) -> dict[str, np.ndarray]:
        """Return what must outlive a round, as arrays by name (control variates, momentum)."""
        return {}

    def load_state(self, arrays: Arrays) -> None:
        """Restore what `state` returned; names of other owners are passed over."""
        del arrays

    def fields(self) -> dict[str, float]:
        """Return what the log's line of the last aggregated round says beside the usual."""
        return {}
