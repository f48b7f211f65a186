"""FedAvg, the client half: plain local SGD (its server half: `server/strategies/fedavg.py`).

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, arXiv 1602.05629, Algorithm 1: a client takes the steps w <- w - lr g(w) over batches
of its own examples, E times over all of them, and sends w. `fedkn/reference.py` is all of it on one
page.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedkn.training.rule import LocalRule

__all__ = ["FedAvg"]


@dataclass(frozen=True)
class FedAvg(LocalRule):
    """Adds nothing to local SGD, carries nothing, and needs nothing but the global model."""


RULE = FedAvg
