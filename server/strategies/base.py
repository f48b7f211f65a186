"""What a strategy is to the server: from the updates' shared parameters to the next ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from flwr.app import ConfigRecord

from server.gate.screening import Update

__all__ = ["Arrays", "NoAggregate", "Strategy", "weighted_sum"]

Arrays = Mapping[str, np.ndarray]


class NoAggregate(Exception):
    """The strategy makes nothing usable of these updates; the text is the reason."""


class Strategy(ABC):
    """Aggregates the shared parameters of a model; of other tensors it knows nothing."""

    def instructions(self, round_: int, parameters: Arrays, config: ConfigRecord) -> ConfigRecord:
        """Return `config` with what the clients need to know in this round."""
        del round_, parameters
        return config

    def control(self, parameters: Arrays) -> dict[str, np.ndarray]:
        """Return what is sent beside the `parameters`, in their shapes and dtypes; most send none.

        SCAFFOLD sends the server's control variate.
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


def weighted_sum(
    updates: Sequence[Update], weights: Sequence[float], names: Iterable[str]
) -> dict[str, np.ndarray]:
    """Return the weighted sum of the updates' tensors `names`, in float64 and in their order."""
    return {
        name: np.sum(
            [
                update.arrays[name].astype(np.float64) * weight
                for update, weight in zip(updates, weights, strict=True)
            ],
            axis=0,
        )
        for name in names
    }
