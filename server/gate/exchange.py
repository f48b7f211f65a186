"""Messages to nodes, and their replies as they come."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.superlink.grid import HttpGrid

from fedkn.federation import record_bytes
from server.gate.arrivals import INCOMPLETE, Arrivals
from server.signing import sign_messages

__all__ = ["Arrived", "exchange"]

_LOG = logging.getLogger("flwr")
_PUSHES = 3
# Flower's grid of deployed nodes would look for replies every three seconds.
_POLL_SECONDS = 0.25


class Arrived(NamedTuple):
    """What a look for replies brought."""

    replies: list[Message]
    lost: dict[str, str]
    """By the id of its message, why a reply will never be."""


def exchange(
    grid: Grid, messages: Sequence[Message], timeout: float, *, one_by_one: bool = False
) -> Iterator[Arrived]:
    """Send `messages` through `grid`; return their replies as they come, for `timeout` seconds.

    The messages have their ids, and are sent, when this returns. Whoever stops listening loses the
    replies that have not come. A grid of no deployed nodes is asked for all replies at once, which
    is what its engine does best, unless they are wanted `one_by_one`.
    """
    if not messages:
        return iter(())
    if not one_by_one and not isinstance(grid, HttpGrid):
        return iter([Arrived(list(grid.send_and_receive(messages, timeout=timeout)), {})])
    deadline = time.monotonic() + timeout
    if isinstance(grid, HttpGrid):
        sign_messages(messages)
    waiting = _pushed(grid, messages)
    return _arriving(grid, waiting, deadline, _largest_reply(messages))


def _pushed(grid: Grid, messages: Sequence[Message]) -> set[str]:
    """Push the messages and return the ids of those that the SuperLink has taken.

    One that was restarted meanwhile refuses a part that it has already, whose answer was lost, and
    all parts after three minutes: pushed again, the messages are the same, and it asks for the
    parts that it lacks.
    """
    pushes = 0
    while True:
        pushes += 1
        try:
            # A message that the SuperLink did not take has an empty id: nobody will answer it.
            return {one for one in grid.push_messages(messages) if one}
        except ObjectPushError as error:
            if pushes == _PUSHES:
                raise
            _LOG.warning("the messages are pushed again: %s", error)


def _arriving(grid: Grid, waiting: set[str], deadline: float, largest: int) -> Iterator[Arrived]:
    arrivals = Arrivals(grid, largest) if isinstance(grid, HttpGrid) else None
    while waiting:
        ids = sorted(waiting)
        arrived = Arrived(*arrivals.pull(ids) if arrivals else (list(grid.pull_messages(ids)), {}))
        waiting -= {reply.metadata.reply_to_message_id for reply in arrived.replies}
        waiting -= arrived.lost.keys()
        yield arrived
        left = deadline - time.monotonic()
        if not waiting or left <= 0:
            break
        time.sleep(min(_POLL_SECONDS, left))
    if arrivals and arrivals.begun:
        yield Arrived([], dict.fromkeys(arrivals.begun, INCOMPLETE))


def _largest_reply(messages: Sequence[Message]) -> int:
    """Return the bytes that a reply may have: clients send no more arrays than they are sent."""
    sent = (
        sum(record_bytes(record) for record in message.content.array_records.values())
        for message in messages
    )
    return max(sent) + _ROOM


# For metrics, the names of arrays, and what Flower wraps around them.
_ROOM = 1 << 22
