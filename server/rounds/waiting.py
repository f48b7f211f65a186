"""Whom a round waits for, and since when: said while it lasts, sparingly."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from server.observers import Audience

__all__ = ["Waiting"]

_LOG = logging.getLogger("flwr")

# So long after an answer, the next one is missed.
_SOON_SECONDS = 5.0
# So long nobody's answer is missed before the first round has shown what is usual.
_FIRST_SECONDS = 10.0
_LONGER = 1.5


class Waiting:
    """Says whom a run waits for: soon, and then each time that the wait has doubled.

    Nobody is missed who takes little longer than clients took in the round before.

    Args:
        log: where each such line is written, of kind ``waiting``.
        age: returns how many seconds ago a client was last heard from, None where nobody knows.
        refresh: called now and then, so that `age` knows of the last heartbeats.
    """

    def __init__(
        self,
        log: Audience,
        age: Callable[[int], float | None],
        refresh: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._age = age
        self._refresh = refresh
        self._clock = clock
        self._usual = _FIRST_SECONDS - _SOON_SECONDS
        self.begin(0)

    def begin(self, round_: int) -> None:
        """Note that a wait of `round_` begins now."""
        self._round = round_
        self._began = self._heard = self._clock()
        self._refreshed = self._began
        self._missing: frozenset[int] = frozenset()
        self._due = self._first()

    def look(self, clients: Iterable[int]) -> None:
        """Take note of whom the wait is for; call it a few times a second while it lasts."""
        now = self._clock()
        missing = frozenset(clients)
        if missing and now >= self._refreshed + _SOON_SECONDS:
            self._refreshed = now
            self._refresh()
        if missing != self._missing:
            if missing < self._missing:
                self._heard = now
            self._missing, self._due = missing, self._first()
        if missing and now >= self._due:
            self._say(sorted(missing), now - self._began)
            self._due = now + max(_SOON_SECONDS, now - self._began)

    def end(self, slowest: float) -> None:
        """Note that the wait is over, and after how many seconds the last answer came."""
        if slowest > 0:
            self._usual = slowest

    def _first(self) -> float:
        return max(self._heard, self._began + _LONGER * self._usual) + _SOON_SECONDS

    def _say(self, clients: list[int], seconds: float) -> None:
        ages = {client: self._age(client) for client in clients}
        known = {client: round(age, 1) for client, age in ages.items() if age is not None}
        self._log.write(
            "waiting",
            round=self._round,
            clients=clients,
            seconds=round(seconds, 1),
            heartbeats={str(client): age for client, age in known.items()},
        )
        named = ", ".join(
            str(client) + (f" (heartbeat {known[client]:.0f} s ago)" if client in known else "")
            for client in clients[:_NAMED]
        )
        more = f" and {len(clients) - _NAMED} others" if len(clients) > _NAMED else ""
        _LOG.info(
            "round %d: waiting for client %s%s, for %.0f s", self._round, named, more, seconds
        )


_NAMED = 8
