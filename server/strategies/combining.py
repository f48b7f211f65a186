"""What Flower's strategies that need every update make of a round's, on the stack.

Each by the settings of Flower's object, which decides what they are by default.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flwr.serverapp.strategy import Bulyan, FedTrimmedAvg, MultiKrum, QFedAvg

from fedkn.averaging import summed, weighted_mean
from fedkn.federation import EXAMPLES, TRAIN_LOSS
from fedkn.stack import distances
from server.gate.screening import Update
from server.strategies import robust
from server.strategies.base import Arrays, NoAggregate

__all__ = ["bulyan", "krum", "median", "q_mean", "trimmed_mean"]


def krum(flower: MultiKrum, sent: Arrays, updates: Sequence[Update]) -> dict[str, np.ndarray]:
    """Return the mean by examples of the updates nearest to the others (arXiv 1703.02757)."""
    places = robust.nearest(
        _ends(updates), sent, flower.num_malicious_nodes, flower.num_nodes_to_select
    )
    chosen = [updates[place] for place in places]
    return weighted_mean(_ends(chosen), [update.metrics[EXAMPLES] for update in chosen], sent)


def median(flower: object, sent: Arrays, updates: Sequence[Update]) -> dict[str, np.ndarray]:
    """Return the coordinate-wise median (arXiv 1803.01498)."""
    del flower
    return robust.median(_ends(updates), sent)


def trimmed_mean(
    flower: FedTrimmedAvg, sent: Arrays, updates: Sequence[Update]
) -> dict[str, np.ndarray]:
    """Return the coordinate-wise trimmed mean (arXiv 1803.01498)."""
    return robust.trimmed_mean(_ends(updates), sent, flower.beta)


def bulyan(flower: Bulyan, sent: Arrays, updates: Sequence[Update]) -> dict[str, np.ndarray]:
    """Return the mean of what is nearest to the median of Krum's choice (arXiv 1802.07927).

    Of n updates Krum leaves n - 2f, of whose values n - 4f are averaged.

    Raises:
        NoAggregate: fewer than 4f + 3 updates.
    """
    tolerated = flower.num_malicious_nodes
    if len(updates) < 4 * tolerated + 3:
        raise NoAggregate(f"{len(updates)} updates are too few for the strategy")
    chosen = len(updates) - 2 * tolerated
    places = robust.nearest(_ends(updates), sent, tolerated, chosen)
    ends = _ends([updates[place] for place in places])
    return robust.bulyan_mean(ends, sent, chosen - 2 * tolerated)


def q_mean(flower: QFedAvg, sent: Arrays, updates: Sequence[Update]) -> dict[str, np.ndarray]:
    """Return w - sum_k d_k / sum_k h_k (arXiv 1905.10497, Algorithm 2), in float64.

    With F_k the loss of client k, w_k what it sent, L = 1 / `flower`'s learning rate and
    D_k = L (w - w_k)::

        d_k = F_k^q D_k        h_k = q F_k^(q-1) |D_k|^2 + L F_k^q
    """
    ends = _ends(updates)
    lipschitz, q = 1 / flower.client_learning_rate, flower.q
    # Flower adds this, so that no power of a loss of zero is infinite.
    losses = np.asarray([update.metrics[TRAIN_LOSS] for update in updates]) + 1e-10
    squares = np.square(lipschitz * np.asarray(distances(ends, sent, sent)))
    powers = np.float_power(losses, q)
    total = np.sum(q * np.float_power(losses, q - 1) * squares + lipschitz * powers)
    parts = (lipschitz * powers / total).tolist()
    moves = summed(ends, sent, lambda k, end, x: (end.double() - x) * parts[k], sent)
    return {name: x + moves[name] for name, x in sent.items()}


def _ends(updates: Sequence[Update]) -> list[Arrays]:
    return [update.arrays for update in updates]
