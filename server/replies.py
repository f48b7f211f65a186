"""The replies of a round: waited for, each checked at the gate, and sorted out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedkn.config import ServerConfig
from fedkn.federation import failure_reason, record_bytes
from fedkn.text import printable
from server.exchange import exchange
from server.screening import RefusedUpdate, Screen, Update

__all__ = ["Replies", "collect"]


@dataclass
class Replies:
    """What came of the messages of a round.

    Attributes:
        updates: the valid ones, ordered by partition.
        refused, failed: ``{"client": partition or None, "reason": one line}``.
        late: partitions that had not replied when there were enough updates, ascending.
        bytes: of the arrays received, refused ones included.
        slowest: seconds after which the last answer came, 0 where none did.
        waited, waited_for: seconds after the last answer in which nothing was waited for but
            clients that then brought none, and which these are.
    """

    updates: list[Update] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    bytes: int = 0
    slowest: float = 0.0
    waited: float = 0.0
    waited_for: list[int] = field(default_factory=list)

    def refuse(self, reasons: Mapping[int, str]) -> None:
        """Refuse updates that had passed: `reasons` by partition."""
        self.updates = [update for update in self.updates if update.partition not in reasons]
        self.refused.extend({"client": client, "reason": text} for client, text in reasons.items())


def collect(
    grid: Grid,
    messages: Mapping[int, Message],
    gate: Screen,
    limits: ServerConfig,
    still_missing: Callable[[set[int]], None] = lambda partitions: None,
) -> Replies:
    """Send `messages`, by partition, and return what comes back within ``round_timeout`` seconds.

    A client counts once, with its first answer to this round's message; an answer to an earlier
    round's, or from another node, is refused. Whoever sent nothing has failed.

    With ``enough_updates`` = k > 0 the wait ends with k valid updates; all that came in with the
    k-th count. Whoever has not replied by then is late, and its reply is never asked for. Which
    updates count then depends on who is quick; a grid that answers everything at once loses none.
    """
    sorting = _Sorting(messages, gate)
    arriving = exchange(
        grid,
        list(messages.values()),
        limits.round_timeout,
        one_by_one=limits.enough_updates > 0,
    )
    # `still_missing` is told a few times a second who has not answered.
    for arrived in arriving:
        for reply in arrived.replies:
            sorting.take(reply)
        for message_id, reason in arrived.lost.items():
            sorting.lose(message_id, reason)
        if 0 < limits.enough_updates <= sorting.valid:
            return sorting.finish(enough=True)
        still_missing(sorting.silent)
    return sorting.finish(enough=False)


class _Sorting:
    """Divides replies into updates, refused ones and failures, as they come."""

    def __init__(self, messages: Mapping[int, Message], gate: Screen) -> None:
        self._messages = messages
        self._gate = gate
        self._asked: dict[str, int] = {}
        self._heard: set[int] = set()
        self._updates: dict[int, Update] = {}
        self._replies = Replies()
        self._gone: set[int] = set()
        self._began = self._answered = time.monotonic()

    @property
    def silent(self) -> set[int]:
        """Return the partitions that have not answered yet."""
        return self._messages.keys() - self._heard

    @property
    def valid(self) -> int:
        """Return the number of valid updates so far."""
        return len(self._updates)

    def lose(self, message_id: str, reason: str) -> None:
        """Take note that the reply to a message will not come."""
        partition = self._partition(message_id)
        if partition is not None:
            self._heard.add(partition)
            self._gone.add(partition)
            self._replies.failed.append({"client": partition, "reason": printable(reason)})

    def take(self, reply: Message) -> None:
        """Sort out one reply."""
        if not reply.has_error():
            records = reply.content.array_records.values()
            self._replies.bytes += sum(record_bytes(record) for record in records)
        partition = self._partition(reply.metadata.reply_to_message_id)
        try:
            self._take(partition, reply)
        except RefusedUpdate as refusal:
            self._replies.refused.append({"client": partition, "reason": str(refusal)})

    def finish(self, *, enough: bool) -> Replies:
        """Return what came; whoever has not answered is late if that was `enough`, else failed."""
        silent = sorted(self.silent)
        if enough:
            self._replies.late = silent
        else:
            self._replies.waited_for = sorted(self._gone.union(silent))
            if self._replies.waited_for:
                self._replies.waited = time.monotonic() - self._answered
            reason = "no reply: node gone, or slower than server.round_timeout"
            self._replies.failed.extend({"client": p, "reason": reason} for p in silent)
        self._replies.slowest = self._answered - self._began
        self._replies.updates = [self._updates[partition] for partition in sorted(self._updates)]
        return self._replies

    def _partition(self, message_id: str) -> int | None:
        """Return which partition a message went to."""
        # Messages get their ids when they are sent.
        self._asked = self._asked or {
            message.metadata.message_id: partition for partition, message in self._messages.items()
        }
        return self._asked.get(message_id)

    def _take(self, partition: int | None, reply: Message) -> None:
        if partition is None:
            raise RefusedUpdate("answers no message of this round")
        if partition in self._heard:
            raise RefusedUpdate("a second reply in the same round")
        if reply.has_error():
            # Those which Flower makes itself, for a node that went away, do not carry its id.
            self._heard.add(partition)
            if reply.error.code == ErrorCode.NODE_UNAVAILABLE:
                self._gone.add(partition)
            else:
                self._answered = time.monotonic()
            entry = {"client": partition, "reason": failure_reason(reply)}
            self._replies.failed.append(entry)
            return
        if reply.metadata.src_node_id != self._messages[partition].metadata.dst_node_id:
            raise RefusedUpdate("from a node that was not asked")
        self._heard.add(partition)
        self._answered = time.monotonic()
        update = self._gate.check(reply)
        if update.partition != partition:
            raise RefusedUpdate(f"claims to be partition {update.partition}")
        self._updates[partition] = update
