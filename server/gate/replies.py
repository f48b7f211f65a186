"""The replies of a round: waited for, each checked at the gate, and sorted out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedkn.config import ServerConfig
from fedkn.direct import Trained
from fedkn.federation import failure_reason, record_bytes, tensors_to_arrays
from fedkn.stack import Flat
from fedkn.text import printable
from server.gate.exchange import exchange
from server.gate.screening import Claim, RefusedUpdate, Screen, Update
from server.wire import DirectGrid, Order

__all__ = ["Replies", "collect", "collect_directly"]


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
    sorting = _Messages(messages, gate)
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
        if 0 < limits.enough_updates <= sorting.valid():
            return sorting.finish(enough=True)
        still_missing(sorting.silent)
    return sorting.finish(enough=False)


def collect_directly(
    grid: DirectGrid,
    order: Order,
    gate: Screen,
    limits: ServerConfig,
    still_missing: Callable[[set[int]], None] = lambda partitions: None,
) -> Replies:
    """Let the clients of this machine carry out `order`, and return what came of it, as `collect`.

    All of them have answered when any of them is heard.
    """
    sorting = _Sorting(order.nodes, gate)
    # Whoever is waited for one by one is not ended: all count that came.
    timeout = None if limits.enough_updates else limits.round_timeout
    for partition, answer in grid.train(order, timeout).items():
        if isinstance(answer, str):
            sorting.fail(partition, failure_reason(answer))
        else:
            sorting.take_directly(partition, answer, order.bytes_up)
    if 0 < limits.enough_updates <= sorting.valid():
        return sorting.finish(enough=True)
    still_missing(sorting.silent)
    return sorting.finish(enough=False)


class _Sorting:
    """Divides what clients answer into updates, refused ones and failures, as they come.

    Args:
        asked: the partitions.
    """

    def __init__(self, asked: Collection[int], gate: Screen) -> None:
        self._partitions = frozenset(asked)
        self._gate = gate
        self._heard: set[int] = set()
        # In the order in which they came, whenever their tensors are looked at.
        self._refused: list[dict[str, Any] | None] = []
        self._claims: list[tuple[int, int, Claim]] = []
        self._updates: dict[int, Update] = {}
        self._replies = Replies()
        self._gone: set[int] = set()
        self._began = self._answered = time.monotonic()

    @property
    def silent(self) -> set[int]:
        """Return the partitions that have not answered yet."""
        return set(self._partitions - self._heard)

    def valid(self) -> int:
        """Look at the tensors of what came; return the number of valid updates so far."""
        found = self._gate.accepted([claim for *_, claim in self._claims]) if self._claims else []
        for (place, partition, _), update in zip(self._claims, found, strict=True):
            if isinstance(update, RefusedUpdate):
                self._refused[place] = _entry(partition, str(update))
            elif update.partition != partition:
                text = str(RefusedUpdate(f"claims to be partition {update.partition}"))
                self._refused[place] = _entry(partition, text)
            else:
                self._updates[partition] = update
        self._claims.clear()
        return len(self._updates)

    def fail(self, partition: int, reason: str, *, gone: bool = False) -> None:
        """Take note that a client answers that it failed, or that its node is `gone`."""
        self._heard.add(partition)
        if gone:
            self._gone.add(partition)
        else:
            self._answered = time.monotonic()
        self._replies.failed.append(_entry(partition, reason))

    def take_directly(self, partition: int, answer: Trained, size: int) -> None:
        """Take the answer of a client of this machine; an honest one has `size` bytes."""
        found = answer.tensors
        given = found if isinstance(found, Flat) else tensors_to_arrays(found)
        self._replies.bytes += size if isinstance(given, Flat) else record_bytes(given)
        try:
            self._claim(partition, lambda: self._gate.taken(answer.metrics, given))
        except RefusedUpdate as refusal:
            self._refuse(partition, refusal)

    def finish(self, *, enough: bool) -> Replies:
        """Return what came; whoever has not answered is late if that was `enough`, else failed."""
        self.valid()
        silent = sorted(self.silent)
        if enough:
            self._replies.late = silent
        else:
            self._replies.waited_for = sorted(self._gone.union(silent))
            if self._replies.waited_for:
                self._replies.waited = time.monotonic() - self._answered
            reason = "no reply: node gone, or slower than server.round_timeout"
            self._replies.failed.extend(_entry(p, reason) for p in silent)
        self._replies.slowest = self._answered - self._began
        self._replies.refused = [entry for entry in self._refused if entry is not None]
        self._replies.updates = [self._updates[partition] for partition in sorted(self._updates)]
        return self._replies

    def _claim(self, partition: int, read: Callable[[], Claim]) -> None:
        """Note a client's answer and what it claims; its tensors are looked at with others'."""
        self._heard.add(partition)
        self._answered = time.monotonic()
        claim = read()
        self._claims.append((len(self._refused), partition, claim))
        self._refused.append(None)

    def _refuse(self, partition: int | None, refusal: RefusedUpdate) -> None:
        self._refused.append(_entry(partition, str(refusal)))


class _Messages(_Sorting):
    """Sorts the replies to `messages`, by partition."""

    def __init__(self, messages: Mapping[int, Message], gate: Screen) -> None:
        super().__init__(messages.keys(), gate)
        self._messages = messages
        self._asked: dict[str, int] = {}

    def lose(self, message_id: str, reason: str) -> None:
        """Take note that the reply to a message will not come."""
        partition = self._partition(message_id)
        if partition is not None:
            self.fail(partition, printable(reason), gone=True)

    def take(self, reply: Message) -> None:
        """Sort out one reply."""
        if not reply.has_error():
            records = reply.content.array_records.values()
            self._replies.bytes += sum(record_bytes(record) for record in records)
        partition = self._partition(reply.metadata.reply_to_message_id)
        try:
            self._take(partition, reply)
        except RefusedUpdate as refusal:
            self._refuse(partition, refusal)

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
            gone = reply.error.code == ErrorCode.NODE_UNAVAILABLE
            self.fail(partition, failure_reason(reply), gone=gone)
            return
        if reply.metadata.src_node_id != self._messages[partition].metadata.dst_node_id:
            raise RefusedUpdate("from a node that was not asked")
        self._claim(partition, lambda: self._gate.read(reply))


def _entry(partition: int | None, reason: str) -> dict[str, Any]:
    return {"client": partition, "reason": reason}
