"""Which node is which partition: node ids are random per run, partitions are not."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import Message, MessageType, MetricRecord
from flwr.serverapp import Grid

from fedkn.data.summary import DataSummary
from fedkn.errors import FedknError
from fedkn.federation import EXAMPLES, LABELS, METRICS, PARTITION, failure_reason, join_request
from server.exchange import exchange
from server.heartbeats import Heartbeats
from server.waiting import Waiting

__all__ = ["ClientsMissing", "Member", "Membership", "count_nodes"]

_POLL_SECONDS = 1.0
# A client that went offline is waited for until so long after its last heartbeat: a restart takes
# less, and a device that was killed is taken for gone by then.
_GRACE_SECONDS = 60.0


class ClientsMissing(FedknError):
    """Not all clients joined in time; the text names the missing partitions."""


@dataclass(frozen=True)
class Member:
    """A client that has joined: its node now, its partition, and how many examples it declared.

    `labels`: how many of each class, in the order of the experiment's; none where it did not say.
    """

    node_id: int
    partition: int
    examples: int
    labels: tuple[int, ...] = ()


class Membership:
    """Asks nodes who they are, once each, and knows the members by partition.

    A partition that comes back under another node id is the same client. Of two nodes that claim
    one partition the first is believed, as long as it is online.

    Args:
        grid: the Flower grid.
        expected: there are partitions 0 to expected - 1.
        timeout: seconds to wait for clients that are not online.
        data: what they are told of the experiment's images.
        max_examples: a client that declares more is refused: it is not waited for and takes no
            part (0: any number).

    Attributes:
        waited, waited_for: seconds that the last `online` waited, and for which partitions.
    """

    def __init__(
        self,
        grid: Grid,
        expected: int,
        timeout: float,
        *,
        data: DataSummary,
        max_examples: int = 0,
    ) -> None:
        self._grid = grid
        self._expected = expected
        self._timeout = timeout
        self._data = data
        self._members: dict[int, Member] = {}
        self._asked: set[int] = set()
        self._given_up: set[int] = set()
        self._max_examples = max_examples
        self._refused: dict[int, str] = {}
        self._newcomers: dict[int, Member] = {}
        self._heartbeats = Heartbeats(grid)
        self.waited = 0.0
        self.waited_for: list[int] = []

    def age(self, partition: int) -> float | None:
        """Return how many seconds ago a member was last heard from, None where nobody knows."""
        member = self._members.get(partition)
        return self._heartbeats.age(member.node_id) if member else None

    def look(self) -> None:
        """Ask the SuperLink for the members' heartbeats."""
        self._heartbeats.online()

    def join(self) -> None:
        """Wait until all partitions are online.

        Raises:
            ClientsMissing: after `timeout` seconds, naming the partitions and what nodes said.
        """
        missing, complaints = self._wait_for(set(range(self._expected)))
        if not missing and not self._present():
            raise ClientsMissing(
                f"every client was refused; client 0 {self._refused[0]}: raise server.max_examples"
            )
        if missing:
            raise ClientsMissing(_missing(missing, self._expected, self._timeout, complaints))

    def online(
        self, partitions: Iterable[int], waiting: Waiting | None = None
    ) -> dict[int, Member]:
        """Return those of the `partitions` that are online, in their order.

        Waits for one that is not, but only once, and no longer than until a minute after its last
        heartbeat: from then on it is missing until it comes back. Where nobody at all is online it
        is the SuperLink that was away, and everybody is waited for. `waiting` is told of it.
        """
        wanted = list(partitions)
        began = time.monotonic()
        if set(wanted) - self._present().keys():
            self._ask(self._strangers() - self._asked, self._timeout)
        self._given_up -= self._present().keys()
        awaited = set(wanted) - self._given_up - self._present().keys()
        missing, _ = self._wait_for(set(wanted) - self._given_up, waiting)
        self._given_up.update(missing)
        present = self._present()
        self.waited_for = sorted(awaited - self._refused.keys())
        self.waited = time.monotonic() - began if self.waited_for else 0.0
        return {partition: present[partition] for partition in wanted if partition in present}

    def newcomers(self) -> list[Member]:
        """Return who has joined, or joined again, since the last call, by partition."""
        joined = [self._newcomers[p] for p in range(self._expected) if p in self._newcomers]
        self._newcomers.clear()
        return joined

    def why_absent(self, partition: int) -> str:
        """Return why a partition that `online` left out takes no part."""
        refusal = self._refused.get(partition)
        return f"refused on joining: {refusal}" if refusal else "not online when the round began"

    def _wait_for(
        self, wanted: set[int], waiting: Waiting | None = None
    ) -> tuple[list[int], list[str]]:
        """Wait for partitions; return those still missing and what nodes complained of."""
        complaints: list[str] = []
        deadline = time.monotonic() + self._timeout
        while missing := wanted - self._present().keys() - self._refused.keys():
            left = deadline - time.monotonic()
            if left <= 0 or missing <= self._known_dead():
                break
            if waiting:
                waiting.look(missing)
            complaints = self._ask(self._strangers(), left)
            if wanted - self._present().keys() - self._refused.keys():
                time.sleep(min(_POLL_SECONDS, left))
        return sorted(missing), complaints

    def _known_dead(self) -> set[int]:
        """Return the members that are offline and have been silent for longer than the grace."""
        present = self._present()
        if not present:
            return set()
        ages = {p: self.age(p) for p in self._members.keys() - present.keys()}
        return {p for p, age in ages.items() if age is not None and age >= _GRACE_SECONDS}

    def _present(self) -> dict[int, Member]:
        online = self._heartbeats.online()
        return {p: member for p, member in self._members.items() if member.node_id in online}

    def _strangers(self) -> set[int]:
        """Return the nodes online of which it is not known who they are."""
        known = {member.node_id for member in self._members.values()}
        return self._heartbeats.online() - known

    def _ask(self, nodes: set[int], timeout: float) -> list[str]:
        """Ask `nodes` who they are; return their complaints."""
        questions = [
            Message(join_request(self._data), dst_node_id=node, message_type=MessageType.QUERY)
            for node in sorted(nodes)
        ]
        self._asked |= nodes
        answers: list[Member] = []
        complaints: list[str] = []
        for arrived in exchange(self._grid, questions, timeout):
            complaints.extend(arrived.lost.values())
            for reply in arrived.replies:
                try:
                    answers.append(_member(reply, len(self._data.classes)))
                except ValueError as error:
                    complaints.append(str(error))
        taken = self._present()
        for member in sorted(answers, key=lambda member: member.node_id):
            if self._max_examples and member.examples > self._max_examples:
                self._refused[member.partition] = (
                    f"declared {member.examples} examples, more than server.max_examples = "
                    f"{self._max_examples}"
                )
            elif member.partition in taken:
                complaints.append(f"two nodes claim partition {member.partition}")
            else:
                self._members[member.partition] = taken[member.partition] = member
                self._newcomers[member.partition] = member
                self._refused.pop(member.partition, None)
        return complaints


def count_nodes(grid: Grid, timeout: float) -> int:
    """Return how many nodes are online, waiting up to `timeout` seconds for the first.

    Raises:
        ClientsMissing: if none came.
    """
    deadline = time.monotonic() + timeout
    while not (count := len(set(grid.get_node_ids()))):
        if time.monotonic() >= deadline:
            raise ClientsMissing(
                f"no SuperNode was online within {timeout:g} s: start them, or raise "
                "server.join_timeout"
            )
        time.sleep(_POLL_SECONDS)
    return count


def _member(reply: Message, classes: int) -> Member:
    if reply.has_error():
        raise ValueError(failure_reason(reply))
    if not reply.has_content():
        raise ValueError("a node answered without content")
    metrics = reply.content.metric_records.get(METRICS, MetricRecord())
    partition, examples = metrics.get(PARTITION), metrics.get(EXAMPLES)
    if not isinstance(partition, int) or not isinstance(examples, int) or examples < 1:
        raise ValueError(f"a node answered partition {partition} with {examples} examples")
    labels = _counts(metrics.get(LABELS, []), classes, examples)
    return Member(reply.metadata.src_node_id, partition, examples, labels)


def _counts(labels: object, classes: int, examples: int) -> tuple[int, ...]:
    """Return how many `examples` a client has of each class; nothing where it does not say."""
    if labels == []:
        return ()
    if isinstance(labels, list) and len(labels) == classes:
        counts = tuple(n for n in labels if type(n) is int and n >= 0)
        if len(counts) == classes and sum(counts) == examples:
            return counts
    raise ValueError(
        f"a node answered with counts of labels that cannot be those of {examples} examples in "
        f"{classes} classes"
    )


def _missing(missing: list[int], expected: int, timeout: float, complaints: list[str]) -> str:
    shown = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
    text = (
        f"{len(missing)} of {expected} clients did not join within {timeout:g} s: partitions "
        f"{shown}. Start them, lower partition.clients, or raise server.join_timeout"
    )
    return f"{text}. A node said: {complaints[0]}" if complaints else text
