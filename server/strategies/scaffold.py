"""SCAFFOLD, the server half: control variates take out the drift of unlike clients.

Karimireddy et al., ICML 2020, arXiv 1910.06378. The client half, which corrects the local steps, is
`fedkn/algorithms/scaffold.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedkn.averaging import summed, weighted_sum
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.training import learning_rate
from server.gate.screening import Update
from server.strategies.base import Arrays, Strategy

__all__ = ["Scaffold"]

_PREFIX = "control/"


class Scaffold(Strategy):
    """SCAFFOLD with option II (arXiv 1910.06378, Algorithm 1, Eq. 4 and 5).

    A client i takes the steps y <- y - lr (g(y) - c_i + c), keeps c_i+ = c_i - c + (x - y)/(K lr)
    and sends y. With S the updates of the round and N all clients the server sets

        x <- x + lr_g mean_S(y_i - x),    c <- c + |S|/N mean_S(c_i+ - c_i).

    Both means are uniform, as in the paper. The difference of a client's variates,
    (x - y_i)/(K_i lr) - c, contains nothing that the server does not have, so it is computed here
    and nothing is sent for it: an update costs as much as FedAvg's, and no client can set c but
    through its update. K_i is the number of local steps in the update's metrics.

    With local momentum they are means of velocities instead of gradients, as in Flower's baseline
    niid_bench; the client half says of which.

    Raises:
        UserError: with ``train.keep_momentum``: the velocity that it would keep holds c - c_i. With
            DP-SGD.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        if config.train.keep_momentum:
            raise UserError(
                "scaffold needs train.keep_momentum = false: its control variates are means of "
                "velocities that begin at zero in every round"
            )
        if config.privacy.mechanism == "example":
            raise UserError(
                "scaffold corrects every step, which DP-SGD does not take: set strategy.name = "
                "'fedavg', or privacy.mechanism = 'none'"
            )
        self._config = config
        rate = config.strategy.server_learning_rate
        self._rate = 1.0 if rate == "default" else rate
        self._control: dict[str, np.ndarray] = {}

    def control(self, parameters: Arrays) -> dict[str, np.ndarray]:
        """Return c; before the first round it is zero."""
        return {
            name: self._control.get(name, np.zeros_like(value))
            for name, value in parameters.items()
        }

    def aggregate(
        self, round_: int, sent: Arrays, updates: Sequence[Update]
    ) -> dict[str, np.ndarray]:
        """Return x after the round; c goes along."""
        local = learning_rate(self._config.train, round_, self._config.rounds)
        share = len(updates) / self._config.partition.clients
        uniform = [1 / len(updates)] * len(updates)
        ends = [update.arrays for update in updates]
        mean = weighted_sum(ends, uniform, sent)
        lengths = [update.metrics["steps"] * local for update in updates]
        gradients = summed(ends, sent, lambda i, end, x: (x - end.double()) / lengths[i], sent)
        control = self.control(sent)
        following: dict[str, np.ndarray] = {}
        for name, x in sent.items():
            following[name] = (1 - self._rate) * x + self._rate * mean[name]
            gradient = gradients[name] / len(updates)
            moved = (1 - share) * control[name] + share * gradient
            self._control[name] = np.asarray(moved, dtype=x.dtype)
        return following

    def state(self) -> dict[str, np.ndarray]:
        """Return c by parameter."""
        return {_PREFIX + name: value for name, value in self._control.items()}

    def load_state(self, arrays: Arrays) -> None:
        """Restore c."""
        self._control = {
            name.removeprefix(_PREFIX): np.asarray(value)
            for name, value in arrays.items()
            if name.startswith(_PREFIX)
        }


STRATEGY = Scaffold
