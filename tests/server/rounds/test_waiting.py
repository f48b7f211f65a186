"""Whom a round waits for: said soon, sparingly, and never of those who are just slow as usual."""

from __future__ import annotations

import itertools
import json
import time
from types import SimpleNamespace

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.superlink.grid import HttpGrid

from fedkn.config import ServerConfig
from server.gate import replies as replies_module
from server.gate.exchange import Arrived
from server.gate.replies import collect
from server.metrics_log import MetricsLog
from server.rounds import membership as membership_module
from server.rounds.heartbeats import Heartbeats, heartbeat_age
from server.rounds.membership import Membership
from server.rounds.waiting import Waiting
from tests.server.rounds.test_membership import IMAGES, Nodes, nodes_of


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def watched(tmp_path, ages=None):
    clock = Clock()
    waiting = Waiting(MetricsLog(tmp_path, "c"), (ages or {}).get, clock=clock)

    def said():
        path = tmp_path / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def look(clients, seconds):
        for _ in range(round(seconds * 4)):
            clock.now += 0.25
            waiting.look(clients)

    return waiting, look, said


def test_it_is_said_soon_and_each_time_that_the_wait_has_doubled(tmp_path):
    waiting, look, said = watched(tmp_path, {2: 12.34})
    waiting.begin(3)
    look({0, 1, 2}, 2)
    look({2}, 100)
    lines = said()
    assert [line["kind"] for line in lines] == ["waiting"] * len(lines)
    assert lines[0]["clients"] == [2]
    assert lines[0]["round"] == 3
    assert lines[0]["heartbeats"] == {"2": 12.3}
    seconds = [line["seconds"] for line in lines]
    assert seconds[0] <= 13
    assert all(later >= 1.9 * sooner for sooner, later in itertools.pairwise(seconds))
    assert len(lines) <= 5


def test_nobody_is_missed_who_takes_as_long_as_usual(tmp_path):
    waiting, look, said = watched(tmp_path)
    waiting.begin(1)
    waiting.end(60.0)
    waiting.begin(2)
    look({0, 1}, 60)
    look({1}, 20)
    assert said() == []
    look({1}, 30)
    assert said()[0]["clients"] == [1]
    # A quick round before makes a dead client seen within seconds.
    waiting.end(2.0)
    waiting.begin(3)
    look({0, 1}, 2)
    before = len(said())
    look({1}, 6)
    assert len(said()) == before + 1


def test_a_round_in_which_all_answer_says_nothing(tmp_path):
    waiting, look, said = watched(tmp_path)
    waiting.begin(1)
    look({0, 1}, 4)
    look({1}, 4)
    look(set(), 50)
    assert said() == []


# -- heartbeats -----------------------------------------------------------------------------------


def node(number: int, seconds_ago: float) -> NodeInfo:
    """A node whose last heartbeat came so long ago; they promise one every 30 s."""
    until = time.time() - seconds_ago + 60.0
    return NodeInfo(node_id=number, status="online", online_until=until, heartbeat_interval=30.0)


def test_the_age_of_a_heartbeat_is_read_off_what_the_superlink_keeps():
    assert heartbeat_age(node(1, 17.0)) == pytest.approx(17.0, abs=0.5)
    assert heartbeat_age(NodeInfo(node_id=1, status="registered")) is None
    gone = NodeInfo(node_id=1, status="offline", online_until=time.time() - 4.0)
    assert heartbeat_age(gone) == pytest.approx(4.0, abs=0.5)


class Deployed(HttpGrid):
    """A SuperLink's nodes, as its Runtime API tells of them."""

    def __init__(self) -> None:
        self.nodes: list[NodeInfo] = []

    def get_nodes(self):
        return self.nodes

    def close(self) -> None:
        pass


def test_heartbeats_of_deployed_nodes_grow_old(monkeypatch):
    grid, clock = Deployed(), Clock()
    heartbeats = Heartbeats(grid, clock)
    grid.nodes = [node(1, 5.0), node(2, 20.0)]
    assert heartbeats.online() == {1, 2}
    assert heartbeats.age(2) == pytest.approx(20.0, abs=0.5)
    assert heartbeats.age(3) is None
    grid.nodes = [node(1, 5.0)]
    clock.now += 45.0
    assert heartbeats.online() == {1}
    assert heartbeats.age(2) == pytest.approx(65.0, abs=0.5)
    # The SuperLink itself was away: nobody's silence counts any more.
    grid.nodes = []
    assert heartbeats.online() == set()
    clock.now += 300.0
    grid.nodes = [node(1, 1.0)]
    assert heartbeats.online() == {1}
    assert heartbeats.age(2) == pytest.approx(0.0, abs=0.5)


# -- who is not waited for ------------------------------------------------------------------------


def test_a_member_known_to_be_dead_stalls_no_round(monkeypatch):
    monkeypatch.setattr(membership_module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(membership_module, "_GRACE_SECONDS", 0.3)
    grid = Nodes(n1=0, n2=1)
    membership = Membership(grid, 2, timeout=30.0, data=IMAGES)
    membership.join()
    grid.nodes = [1]
    began = time.monotonic()
    assert nodes_of(membership.online([0, 1])) == {0: 1}
    assert 0.2 < time.monotonic() - began < 5.0
    assert membership.waited_for == [1]
    assert membership.waited == pytest.approx(time.monotonic() - began, abs=0.2)
    began = time.monotonic()
    assert nodes_of(membership.online([0, 1])) == {0: 1}
    assert time.monotonic() - began < 0.2
    assert (membership.waited, membership.waited_for) == (0.0, [])
    grid.nodes = [1, 2]
    assert nodes_of(membership.online([0, 1])) == {0: 1, 1: 2}


def test_where_nobody_is_online_everybody_is_waited_for(monkeypatch):
    """It is the SuperLink that was away, not all of its devices at once."""
    monkeypatch.setattr(membership_module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(membership_module, "_GRACE_SECONDS", 0.05)
    grid = Nodes(n1=0, n2=1)
    membership = Membership(grid, 2, timeout=0.6, data=IMAGES)
    membership.join()
    grid.nodes = []
    began = time.monotonic()
    assert membership.online([0, 1]) == {}
    assert time.monotonic() - began >= 0.6


def asked(*partitions):
    messages = {
        partition: Message(RecordDict(), dst_node_id=100 + partition, message_type="train")
        for partition in partitions
    }
    for partition, message in messages.items():
        message.metadata.__dict__["_message_id"] = f"m{partition}"
    return messages


def test_what_is_spent_on_a_client_that_is_not_there_is_told_apart(monkeypatch):
    messages = asked(0, 1)
    refused = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "no"), reply_to=messages[0])
    gone = Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=messages[1])

    def arriving(*arguments, **options):
        yield Arrived([refused], {})
        time.sleep(0.3)
        yield Arrived([], {})
        yield Arrived([gone], {})

    monkeypatch.setattr(replies_module, "exchange", arriving)
    looks = []
    gate = SimpleNamespace()
    replies = collect(SimpleNamespace(), messages, gate, ServerConfig(), looks.append)
    assert looks == [{1}, {1}, set()]
    assert replies.waited_for == [1]
    assert 0.3 <= replies.waited < 2.0
    assert [loss["client"] for loss in replies.failed] == [0, 1]


def test_a_slow_client_that_answers_was_not_waited_for_in_vain(monkeypatch):
    messages = asked(0)
    slow = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "no"), reply_to=messages[0])

    def arriving(*arguments, **options):
        time.sleep(0.2)
        yield Arrived([slow], {})

    monkeypatch.setattr(replies_module, "exchange", arriving)
    replies = collect(SimpleNamespace(), messages, SimpleNamespace(), ServerConfig())
    assert (replies.waited, replies.waited_for) == (0.0, [])
    assert replies.slowest >= 0.2
