from __future__ import annotations

import re
import time

import pytest
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from fedkn.data.summary import DataSummary
from fedkn.errors import UserError
from fedkn.federation import join_answer
from server.gate.plausible import most_examples
from server.rounds import membership as module
from server.rounds.identities import read_identities, write_identities
from server.rounds.membership import ClientsMissing, Member, Membership
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


def test_what_a_node_said_is_told_though_the_last_question_found_no_answer():
    class Slow(Nodes):
        def _answer(self, message: Message) -> list[Message]:
            return [] if self.asked else super()._answer(message)

    with pytest.raises(ClientsMissing, match="A node said: not signed"):
        Membership(Slow(n1="not signed"), 1, timeout=0.1, data=IMAGES).join()


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
    "metrics",
    [
        {"partition-id": 0},
        {"partition-id": 0, "num-examples": 3, "more": 1},
        {"partition-id": 0, "num-examples": 0},
        {"partition-id": 0, "num-examples": -3},
        {"partition-id": 0, "num-examples": 10**18},
        {"partition-id": 0, "num-examples": 3.0},
        {"partition-id": 0, "num-examples": float("nan")},
        {"partition-id": 0, "num-examples": [4]},
    ],
)
def test_numbers_that_cannot_be_cost_that_client_its_part_and_nobody_else(metrics, caplog):
    grid = Nodes(n1=RecordDict({"metrics": MetricRecord(metrics)}), n2=1)
    membership = Membership(grid, 2, timeout=5.0, data=IMAGES)
    membership.join()
    assert nodes_of(membership.online([0, 1])) == {1: 2}
    assert "refused on joining: a node answered partition 0 with" in membership.why_absent(0)
    assert "client 0 is refused on joining" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"metrics": MetricRecord({"partition-id": 0.5, "num-examples": 3})}),
        RecordDict({"metrics": MetricRecord({"partition-id": -1, "num-examples": 3})}),
        RecordDict({"metrics": MetricRecord({"partition-id": 7, "num-examples": 3})}),
    ],
)
def test_an_answer_of_no_client_is_no_membership(content):
    with pytest.raises(ClientsMissing, match=r"A node said: (a node answered|claims to be) part"):
        Membership(Nodes(n1=content), 1, timeout=0.03, data=IMAGES).join()


def test_if_all_are_refused_it_says_why():
    grid = Nodes(n1=RecordDict({"metrics": MetricRecord({"partition-id": 0, "num-examples": 0})}))
    with pytest.raises(ClientsMissing, match="every client was refused; client 0 a node answered"):
        Membership(grid, 1, timeout=5.0, data=IMAGES).join()


def test_a_client_that_answered_oddly_may_answer_well_later():
    odd = RecordDict({"metrics": MetricRecord({"partition-id": 0, "num-examples": 0})})
    grid = Nodes(n1=odd, n2=1)
    membership = Membership(grid, 2, timeout=5.0, data=IMAGES)
    membership.join()
    grid.answers[5] = 0
    grid.nodes.append(5)
    assert nodes_of(membership.online([0, 1])) == {0: 5, 1: 2}


def test_an_odd_answer_in_the_name_of_a_member_changes_nothing_for_it():
    grid = Nodes(n1=0, n2=1)
    membership = Membership(grid, 2, timeout=0.05, data=IMAGES)
    membership.join()
    grid.answers[3] = RecordDict({"metrics": MetricRecord({"partition-id": 0, "num-examples": 0})})
    grid.nodes = [2, 3]
    membership.online([0, 1])
    grid.nodes = [1, 2, 3]
    assert nodes_of(membership.online([0, 1])) == {0: 1, 1: 2}


def test_what_a_node_says_is_shown_printable_and_logged_once(caplog):
    grid = Nodes(n1="\x1b[2J no data\x0bINFO : fine", n2=1)
    with pytest.raises(ClientsMissing, match=re.escape("\\x1b[2J no data INFO : fine")):
        Membership(grid, 2, timeout=0.05, data=IMAGES).join()
    assert grid.asked.count(1) > 1
    assert caplog.text.count("node 1 is no client: \\x1b[2J no data INFO : fine") == 1


def test_an_answer_in_another_nodes_name_is_refused(caplog):
    grid = Nodes(n1=0, n2=1)
    answer = grid.respond

    def forge(message: Message) -> list[Message]:
        (reply,) = answer(message)
        if message.metadata.dst_node_id == 2:
            reply.metadata.__dict__["_src_node_id"] = 1
        return [reply]

    grid.respond = forge
    with pytest.raises(ClientsMissing, match="in the name of another node"):
        Membership(grid, 2, timeout=0.05, data=IMAGES).join()


# -- partitions bound to keys ---------------------------------------------------------------------


class Keyed(Nodes):
    """Nodes of a fleet, which Flower knows by their keys: that of node N is ``key N``."""

    def get_nodes(self):
        return [NodeInfo(node_id=node, public_key=f"key {node}".encode()) for node in self.nodes]


@pytest.fixture
def identities(tmp_path):
    """Node 8 is partition 0, node 9 partition 1, by the file that a run's server finds."""
    write_identities(tmp_path, {0: b"key 8", 1: b"key 9"})
    return read_identities(str(tmp_path))


def test_a_device_is_what_its_key_stands_for_and_an_impostor_is_refused(identities, caplog):
    # Node 3 would be believed, for its smaller id; its key is of no device.
    grid = Keyed(n3=0, n8=0, n9=1)
    membership = Membership(grid, 2, timeout=1.0, data=IMAGES, identities=identities)
    membership.join()
    assert nodes_of(membership.online([0, 1])) == {0: 8, 1: 9}
    assert 3 not in grid.asked
    assert "node 3 is no client: its key is that of no device of this fleet" in caplog.text


def test_a_device_that_claims_anothers_partition_is_refused_whoever_is_first(identities, caplog):
    grid = Keyed(n8=1, n9=1)
    membership = Membership(grid, 2, timeout=1.0, data=IMAGES, identities=identities)
    membership.join()
    assert nodes_of(membership.online([0, 1])) == {1: 9}
    text = "claims to be partition 1, but its key is that of partition 0"
    assert membership.why_absent(0) == f"refused on joining: {text}"
    assert f"node 8 is no client: {text}" in caplog.text


def test_an_impostor_does_not_take_over_while_the_device_is_away(identities):
    grid = Keyed(n8=0, n9=1)
    membership = Membership(grid, 2, timeout=0.05, data=IMAGES, identities=identities)
    membership.join()
    grid.answers[3] = 0
    grid.nodes = [3, 9]
    assert nodes_of(membership.online([0, 1])) == {1: 9}
    grid.nodes = [3, 8, 9]
    assert nodes_of(membership.online([0, 1])) == {0: 8, 1: 9}


def test_without_keys_both_that_claim_a_partition_are_logged(caplog):
    membership = Membership(Nodes(n5=0, n3=0, n8=1), 2, timeout=1.0, data=IMAGES)
    membership.join()
    assert "node 5 is no client: claims partition 0, which node 3 has, and keeps" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", '{"a": "b"}', "{", "[" * 10_000, "\xff"])
def test_a_damaged_file_of_keys_is_named(text, tmp_path):
    (tmp_path / "devices.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="which device is which partition"):
        read_identities(str(tmp_path))


def test_without_a_file_nothing_is_bound(tmp_path):
    assert read_identities(str(tmp_path)) is None
    assert read_identities("") is None


# -- how many examples a client may have ----------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "experiment", "declared", "most"),
    [
        ("auto", 100, [], 100),
        ("auto", 100, [9, 9, 10**12], 100),
        ("auto", 100, [50, 60, 10**12], 600),
        ("auto", 100, [50, 10**12], 500),
        (0, 100, [50, 10**12], float("inf")),
        (7, 100, [50, 10**12], 7),
    ],
)
def test_a_client_may_declare_what_the_experiment_has_or_ten_times_the_median(
    limit, experiment, declared, most
):
    assert most_examples(limit, experiment, declared) == most


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
