"""Messages and their replies as they come, from deployed nodes and from engines."""

from __future__ import annotations

import pytest
from flwr.app import Message, RecordDict

from server.gate import exchange as module
from server.gate.arrivals import INCOMPLETE
from server.gate.exchange import exchange
from tests.server.fake_grid import ScriptedGrid


def question(node: int) -> Message:
    return Message(RecordDict(), dst_node_id=node, message_type="query")


def test_an_engine_is_asked_once_for_all() -> None:
    grid = ScriptedGrid([1, 2], lambda message: [Message(RecordDict(), reply_to=message)])
    messages = [question(1), question(2)]
    (arrived,) = exchange(grid, messages, 5.0)
    asked = [reply.metadata.reply_to_message_id for reply in arrived.replies]
    assert asked == [message.metadata.message_id for message in messages]
    assert not arrived.lost


def test_nobody_is_asked_nothing() -> None:
    grid = ScriptedGrid([], lambda message: pytest.fail("sent"))
    assert list(exchange(grid, [], 5.0)) == []


class Deployed:
    """A grid of deployed nodes that takes messages; what comes back is scripted below."""

    def push_messages(self, messages):
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"asked-{number}"
        return [message.metadata.message_id for message in messages]


class Scripted:
    """In the place of `Arrivals`: one reply at a time; the last is only ever announced."""

    def __init__(self, grid: Deployed, largest: int) -> None:
        self.looks = 0
        self.begun = {"asked-2"}

    def pull(self, ids):
        self.looks += 1
        if self.looks == 1:
            return [], {}
        if self.looks == 2:
            reply = Message(RecordDict(), reply_to=asked("asked-0"))
            return [reply], {"asked-1": "unreadable"}
        assert list(ids) == ["asked-2"]
        return [], {}


def asked(message_id: str) -> Message:
    message = question(7)
    message.metadata.__dict__["_message_id"] = message_id
    return message


def test_deployed_nodes_replies_come_one_by_one_and_one_cut_off_is_named(monkeypatch) -> None:
    ScriptedGrid([], lambda message: [])  # messages need a process that has an identity
    monkeypatch.setattr(module, "HttpGrid", Deployed)
    monkeypatch.setattr(module, "Arrivals", Scripted)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    messages = [question(node) for node in range(3)]
    looks = list(exchange(Deployed(), messages, 0.1))
    replies = [r.metadata.reply_to_message_id for look in looks for r in look.replies]
    lost = {key: reason for look in looks for key, reason in look.lost.items()}
    assert replies == ["asked-0"]
    assert lost == {"asked-1": "unreadable", "asked-2": INCOMPLETE}
