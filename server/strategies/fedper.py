"""FedPer, the server half: FedAvg's mean of the layers that clients share.

Arivazhagan et al., 2019, arXiv 1912.00818. Which layers stay on the clients is the client half's
(`fedkn/algorithms/fedper.py`).
"""

from __future__ import annotations

from typing import ClassVar

from server.strategies.personal import PersonalMean

__all__ = ["FedPer"]


class FedPer(PersonalMean):
    """The mean by examples."""

    more_passes: ClassVar[bool] = False


STRATEGY = FedPer
