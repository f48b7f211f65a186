from __future__ import annotations

import time

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict

from fedkn.data.summary import DataSummary
from fedkn.federation import join_answer
from server import membership as module
from server.membership import ClientsMissing, Member, Membership
from tests.server.fake_grid import ScriptedGrid

IMAGES = DataSummary(("no", "yes"), (1, 8, 8))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)


class Nodes(ScriptedGrid):
    """Nodes by id, each with what it answers; counts how often it was asked."""

    def __init__(self, **answers):
        self.answers = {int(name[1:]): answer for name, answer in answers.items()}
        self.asked: list[int] = []
        super().__init__(self.answers, self._answer)

    def _answer(self, message: Message) -> list[Message]:
        node = message.metadata.dst_node_id
        self.asked.append(node)
        answer = self.answers[node]
        if answer is None:
            return []
        if isinstance(answer, str):
            return [Message(Error(1, answer), reply_to=message)]
        if isinstance(answer, RecordDict):
            return [Message(answer, reply_to=message)]
        return [Message(join_answer(answer, 10 + answer), reply_to=message)]


def nodes_of(members: dict[int, Member]) -> dict[int, int]:
    return {partition: member.node_id for partition, member in members.items()}


def test_nodes_are_asked_once_and_known_by_partition():
    grid = Nodes(n9=0, n4=2, n7=1)
    membership = Membership(grid, 3, timeout=1.0, data=IMAGES)
    membership.join()
    members = membership.online([2, 0])
    assert members == {2: Member(4, 2, 12), 0: Member(9, 0, 10)}
    assert list(members) == [2, 0]
    assert sorted(grid.asked) == [4, 7, 9]


def test_late_joiners_are_waited_for(monkeypatch):
    grid = Nodes(n1=0)
    sleep = time.sleep

    def join_meanwhile(seconds: float) -> None:
        grid.answers.setdefault(2, 1)
        grid.nodes = list(grid.answers)
        sleep(seconds)

    monkeypatch.setattr(module.time, "sleep", join_meanwhile)
    membership = Membership(grid, 2, timeout=5.0, data=IMAGES)
    membership.join()
    assert nodes_of(membership.online([0, 1])) == {0: 1, 1: 2}


def test_the_missing_partitions_are_named_with_what_a_node_said():
    grid = Nodes(n1=0, n2="Traceback …\nUserError: no data under /data", n3=2)
    with pytest.raises(ClientsMissing) as caught:
        Membership(grid, 4, timeout=0.05, data=IMAGES).join()
    text = str(caught.value)
    assert "2 of 4 clients did not join within 0.05 s: partitions 1, 3." in text
    assert "UserError: no data under /data" in text
    assert "Traceback" not in text


def test_many_missing_partitions_are_abbreviated():
    with pytest.raises(ClientsMissing, match=r"partitions 0, 1, .*, 9, …\."):
        Membership(Nodes(), 40, timeout=0.02, data=IMAGES).join()


def test_a_node_that_fails_at_first_is_asked_again():
    grid = Nodes(n1=0, n2="not ready")
    answer = grid.respond

    def mend(message: Message) -> list[Message]:
        replies = list(answer(message))
        if grid.asked.count(2) == 2:
            grid.answers[2] = 1
        return replies

    grid.respond = mend
    membership = Membership(grid, 2, timeout=5.0, data=IMAGES)
    membership.join()
    assert grid.asked.count(1) == 1
    assert grid.asked.count(2) == 3


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"metrics": MetricRecord({"partition-id": 0})}),
        RecordDict({"metrics": MetricRecord({"partition-id": 0.5, "num-examples": 3})}),
        RecordDict({"metrics": MetricRecord({"partition-id": 0, "num-examples": 0})}),
        RecordDict({"metrics": MetricRecord({"partition-id": 0, "num-examples": [4]})}),
    ],
)
def test_an_odd_answer_is_no_membership(content):
    with pytest.raises(ClientsMissing, match="A node said: a node answered partition"):
        Membership(Nodes(n1=content), 1, timeout=0.03, data=IMAGES).join()


def test_of_two_nodes_with_one_partition_the_first_is_believed():
    grid = Nodes(n5=0, n3=0, n8=1)
    membership = Membership(grid, 2, timeout=1.0, data=IMAGES)
    membership.join()
    assert nodes_of(membership.online([0, 1])) == {0: 3, 1: 8}
    grid.answers[1] = 0
    grid.nodes = [1, 3, 5, 8]
    assert nodes_of(membership.online([0])) == {0: 3}


def test_a_client_may_come_back_as_another_node():
    grid = Nodes(n1=0, n2=1)
    membership = Membership(grid, 2, timeout=0.05, data=IMAGES)
    membership.join()
    grid.answers = {1: 0, 7: 1}
    grid.nodes = [1, 7]
    assert nodes_of(membership.online([0, 1])) == {0: 1, 1: 7}


def test_an_absent_client_is_waited_for_once_and_comes_back():
    grid = Nodes(n1=0, n2=1)
    membership = Membership(grid, 2, timeout=0.3, data=IMAGES)
    membership.join()
    grid.nodes = [1]
    started = time.monotonic()
    assert nodes_of(membership.online([0, 1])) == {0: 1}
    waited = time.monotonic() - started
    assert waited >= 0.3
    naps: list[float] = []
    sleep, module.time.sleep = time.sleep, naps.append
    try:
        assert nodes_of(membership.online([0, 1])) == {0: 1}
    finally:
        module.time.sleep = sleep
    assert naps == []
    grid.answers[6] = 1
    grid.nodes = [1, 6]
    assert nodes_of(membership.online([0, 1])) == {0: 1, 1: 6}


def test_a_silent_extra_node_is_not_asked_again_in_every_round():
    grid = Nodes(n1=0, n2=1, n3=None)
    membership = Membership(grid, 2, timeout=1.0, data=IMAGES)
    membership.join()
    for _ in range(3):
        membership.online([0, 1])
    assert grid.asked.count(3) == 1


def answered(**metrics) -> RecordDict:
    return RecordDict({"metrics": MetricRecord({"partition-id": 0, "num-examples": 9, **metrics})})


def test_who_joins_is_told_once_with_what_it_holds():
    grid = Nodes(n1=join_answer(0, 9, [4, 5]), n2=1)
    membership = Membership(grid, 2, timeout=1.0, data=IMAGES)
    membership.join()
    assert membership.newcomers() == [Member(1, 0, 9, (4, 5)), Member(2, 1, 11)]
    assert membership.newcomers() == []
    # Back under another node's id, with other images.
    grid.answers = {2: 1, 3: join_answer(0, 7, [7, 0])}
    grid.nodes = [2, 3]
    membership.online([0, 1])
    assert membership.newcomers() == [Member(3, 0, 7, (7, 0))]


@pytest.mark.parametrize(
    "labels",
    [[4, 4], [10, -1], [9], [4, 5, 0], [4.0, 5.0], 9, 0, [9, 0, *[0] * 50_000]],
)
def test_counts_that_cannot_be_are_refused(labels):
    with pytest.raises(ClientsMissing, match="cannot be those of 9 examples in 2 classes"):
        Membership(Nodes(n1=answered(labels=labels)), 1, timeout=0.05, data=IMAGES).join()


def test_a_partition_that_is_not_expected_is_no_newcomer():
    grid = Nodes(n1=0, n2=join_answer(10**12, 9, [4, 5]))
    membership = Membership(grid, 1, timeout=1.0, data=IMAGES)
    membership.join()
    assert [member.partition for member in membership.newcomers()] == [0]
