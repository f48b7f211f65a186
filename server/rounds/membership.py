"""Which node is which partition: node ids are random per run, partitions are not."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedkn.data.summary import DataSummary
from fedkn.errors import FedknError
from fedkn.federation import EXAMPLES, LABELS, METRICS, PARTITION, failure_reason, join_request
from fedkn.text import printable
from server.gate.exchange import exchange
from server.gate.plausible import joining_ranges, numbers_in
from server.rounds.heartbeats import Heartbeats
from server.rounds.identities import Identities
from server.rounds.waiting import Waiting

__all__ = ["ClientsMissing", "Member", "Membership", "count_nodes"]

_LOG = logging.getLogger("flwr")
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

    A partition that comes back under another node id is the same client. With `identities` a node
    is what its key stands for: one that says otherwise, or whose key is nobody's, is refused.
    Without, of two nodes that claim one partition the first is believed, as long as it is online.
    Either way the log names both.

    Args:
        grid: the Flower grid.
        expected: there are partitions 0 to expected - 1.
        timeout: seconds to wait for clients that are not online.
        data: what they are told of the experiment's images.
        most_examples: from what the members declared, how many examples a client may have. One
            that declares more is refused: it is not waited for and takes no part.
        identities: which key is whose.

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
        most_examples: Callable[[Collection[int]], float] = lambda declared: math.inf,
        identities: Identities | None = None,
    ) -> None:
        self._grid = grid
        self._expected = expected
        self._timeout = timeout
        self._data = data
        self._most_examples = most_examples
        self._identities = identities
        self._members: dict[int, Member] = {}
        self._asked: set[int] = set()
        self._given_up: set[int] = set()
        self._odd: dict[int, str] = {}
        self._complaints: list[str] = []
        self._logged: dict[int, str] = {}
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
            ClientsMissing: after `timeout` seconds, naming the partitions and what nodes said; or
                all are refused.
        """
        missing, complaints = self._wait_for(set(range(self._expected)))
        if missing:
            raise ClientsMissing(_missing(missing, self._expected, self._timeout, complaints))
        refused = self._refused()
        for partition, reason in sorted(refused.items()):
            _LOG.warning("client %d is refused on joining: %s", partition, reason)
        if not self._present():
            raise ClientsMissing(f"every client was refused; client 0 {refused.get(0, 'is gone')}")

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
        present = self._present()
        if set(wanted) - present.keys():
            self._ask(self._strangers() - self._asked, self._timeout)
            present = self._present()
        self._given_up -= present.keys()
        self.waited, self.waited_for = 0.0, []
        if awaited := set(wanted) - self._given_up - present.keys():
            missing, _ = self._wait_for(set(wanted) - self._given_up, waiting)
            self._given_up.update(missing)
            present = self._present()
            if found := sorted(awaited - self._refused().keys()):
                self.waited, self.waited_for = time.monotonic() - began, found
        return {partition: present[partition] for partition in wanted if partition in present}

    def newcomers(self) -> list[Member]:
        """Return who has joined, or joined again, since the last call, by partition."""
        joined = [self._newcomers[p] for p in range(self._expected) if p in self._newcomers]
        self._newcomers.clear()
        return joined

    def why_absent(self, partition: int) -> str:
        """Return why a partition that `online` left out takes no part."""
        refusal = self._refused().get(partition)
        return f"refused on joining: {refusal}" if refusal else "not online when the round began"

    def _wait_for(
        self, wanted: set[int], waiting: Waiting | None = None
    ) -> tuple[list[int], list[str]]:
        """Wait for partitions; return those still missing and what nodes complained of."""
        complaints: list[str] = []
        deadline = time.monotonic() + self._timeout
        while missing := wanted - self._present().keys() - self._refused().keys():
            left = deadline - time.monotonic()
            if left <= 0 or missing <= self._known_dead():
                break
            if waiting:
                waiting.look(missing)
            # The last question may have too little time left for an answer.
            complaints = self._ask(self._strangers(), left) or complaints
            if wanted - self._present().keys() - self._refused().keys():
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
        """Return the members that are online and not refused."""
        refused = self._refused()
        return {p: member for p, member in self._online().items() if p not in refused}

    def _online(self) -> dict[int, Member]:
        online = self._heartbeats.online()
        return {p: member for p, member in self._members.items() if member.node_id in online}

    def _absent(self) -> set[int]:
        return set(range(self._expected)) - self._members.keys()

    def _refused(self) -> dict[int, str]:
        """Return by partition why it takes no part, whether online or not."""
        most = self._most_examples([member.examples for member in self._members.values()])
        return self._odd | {
            partition: f"declared {member.examples} examples, more than server.max_examples "
            f"allows ({most:.0f})"
            for partition, member in self._members.items()
            if member.examples > most
        }

    def _strangers(self) -> set[int]:
        """Return the nodes online of which it is not known who they are."""
        known = {member.node_id for member in self._members.values()}
        return self._heartbeats.online() - known

    def _ask(self, nodes: set[int], timeout: float) -> list[str]:
        """Ask `nodes` who they are; return their complaints."""
        self._asked |= nodes
        self._complaints = []
        own = self._identities.by_node(self._grid) if self._identities else {}
        strange = {node for node in nodes if own.get(node) is None} if self._identities else set()
        for node in sorted(strange):
            self._complain(node, "its key is that of no device of this fleet")
        answers = self._answers(nodes - strange, own, timeout)
        taken = self._online()
        for node, member in sorted(answers.items()):
            if member.partition in taken:
                first = taken[member.partition].node_id
                text = f"claims partition {member.partition}, which node {first} has, and keeps"
                self._complain(node, text)
            else:
                self._members[member.partition] = taken[member.partition] = member
                self._newcomers[member.partition] = member
                self._odd.pop(member.partition, None)
        return self._complaints

    def _answers(
        self, nodes: set[int], own: Mapping[int, int | None], timeout: float
    ) -> dict[int, Member]:
        """Return by node who answers to be a client; `own` has what the nodes' keys say."""
        told = dict(join_request(self._data).items())
        questions = [
            Message(RecordDict(told), dst_node_id=node, message_type=MessageType.QUERY)
            for node in sorted(nodes)
        ]
        arriving = exchange(self._grid, questions, timeout)
        asked = {one.metadata.message_id: one.metadata.dst_node_id for one in questions}
        answers: dict[int, Member] = {}
        for arrived in arriving:
            for message_id, reason in arrived.lost.items():
                if message_id in asked:
                    self._complain(asked[message_id], reason)
            for reply in arrived.replies:
                node = asked.get(reply.metadata.reply_to_message_id)
                if node is None or node in answers:
                    continue
                try:
                    found = self._checked(_member(reply), node, own.get(node))
                    answers[node] = _with_labels(found, reply, len(self._data.classes))
                except _OddAnswer as odd:
                    self._complain(node, str(odd))
                    partition = own.get(node, odd.partition)
                    if partition is not None and partition in self._absent():
                        self._odd.setdefault(partition, printable(odd))
                except ValueError as error:
                    self._complain(node, str(error))
        return answers

    def _complain(self, node: int, text: str) -> None:
        self._complaints.append(printable(text))
        # Nodes are asked again and again: what they say again is known.
        if self._logged.get(node) != self._complaints[-1]:
            self._logged[node] = self._complaints[-1]
            _LOG.warning("node %d is no client: %s", node, self._complaints[-1])

    def _checked(self, member: Member, node: int, own: int | None) -> Member:
        """Return `member` if the node that answered may be it: by its key it is `own`, if known."""
        if member.node_id != node:
            raise _OddAnswer("an answer in the name of another node", own)
        if own is not None and member.partition != own:
            raise _OddAnswer(
                f"claims to be partition {member.partition}, but its key is that of partition "
                f"{own}",
                own,
            )
        if member.partition >= self._expected:
            raise _OddAnswer(
                f"claims to be partition {member.partition}, but there are {self._expected}", own
            )
        return member


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


class _OddAnswer(ValueError):
    """An answer that cannot be, of the client of `partition`, if that is known."""

    def __init__(self, text: str, partition: int | None) -> None:
        super().__init__(text)
        self.partition = partition


def _member(reply: Message) -> Member:
    """Return who answered, as it says.

    Raises:
        ValueError: it failed, or gave no answer that can be.
    """
    if reply.has_error():
        raise ValueError(failure_reason(reply))
    if not reply.has_content():
        raise ValueError("a node answered without content")
    metrics = reply.content.metric_records.get(METRICS, MetricRecord())
    numbers = {key: value for key, value in metrics.items() if key != LABELS}
    try:
        found = numbers_in(numbers, joining_ranges())
    except ValueError as error:
        partition = metrics.get(PARTITION)
        raise _OddAnswer(
            f"a node answered partition {printable(partition)} with what cannot be: {error}",
            partition if type(partition) is int else None,
        ) from None
    return Member(reply.metadata.src_node_id, found[PARTITION], found[EXAMPLES])


def _with_labels(member: Member, reply: Message, classes: int) -> Member:
    """Return `member` with how many examples of each class it has, if it says so."""
    labels = reply.content.metric_records[METRICS].get(LABELS, [])
    if labels == []:
        return member
    if isinstance(labels, list) and len(labels) == classes:
        counts = tuple(n for n in labels if type(n) is int and n >= 0)
        if len(counts) == classes and sum(counts) == member.examples:
            return replace(member, labels=counts)
    raise _OddAnswer(
        f"a node answered partition {member.partition} with counts of labels that cannot be those "
        f"of {member.examples} examples in {classes} classes",
        member.partition,
    )


def _missing(missing: list[int], expected: int, timeout: float, complaints: list[str]) -> str:
    shown = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
    text = (
        f"{len(missing)} of {expected} clients did not join within {timeout:g} s: partitions "
        f"{shown}. Start them, lower partition.clients, or raise server.join_timeout"
    )
    return f"{text}. A node said: {complaints[0]}" if complaints else text
