"""Which run this is, and what state each client is in as far as the server accepted it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedkn.federation import RUN_TOKEN, STATE_ROUND

__all__ = ["Participation", "begin"]


@dataclass(frozen=True, eq=False)
class Participation:
    """The run's token, and for every client the round of its last accepted update (0: none).

    A client goes on from the state that this round left, so an update that was refused, or that the
    server forgot when it resumed from a checkpoint, changes nothing on the client either.

    Attributes:
        token: hexadecimal; tells a client's state in this run from that in others.
        last: int64, one number a client.
    """

    token: str
    last: np.ndarray

    def told(self, partition: int) -> dict[str, str | int]:
        """Return what client `partition` is told of its own state."""
        return {RUN_TOKEN: self.token, STATE_ROUND: int(self.last[partition])}

    def after(self, round_: int, accepted: Iterable[int]) -> Participation:
        """Return the participation after `round_`, in which the updates of `accepted` counted."""
        last = self.last.copy()
        last[list(accepted)] = round_
        return Participation(self.token, last)


def begin(clients: int) -> Participation:
    """Return the participation of a new run: nobody has taken part.

    The token is drawn at random: no result depends on it.
    """
    return Participation(secrets.token_hex(8), np.zeros(clients, dtype=np.int64))
