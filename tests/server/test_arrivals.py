"""Replies of deployed nodes that arrive in parts, late, cut off, or as garbage."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedkn.federation import ARRAYS, arrays_record
from server import arrivals as module
from server.arrivals import INCOMPLETE, Arrivals


@dataclass
class SuperLink:
    """Has announced `replies` to the messages of those ids; of their parts, `parts` have come."""

    replies: dict[str, Message] = field(default_factory=dict)
    parts: dict[str, bytes] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)
    confirmed: list[str] = field(default_factory=list)

    # The calls of the SuperLink have names that Python's functions do not.
    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802
        answer = PullAppMessagesResponse()
        for asked in request.message_ids:
            # Flower hands out what was announced once.
            if reply := self.replies.pop(asked, None):
                said = message_to_proto(reply)
                said.metadata.reply_to_message_id = asked
                answer.messages_list.append(said)
                answer.message_object_trees.append(get_object_tree(reply))
        return answer

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        if request.object_id in self.given_up:
            return PullObjectResponse(object_found=False)
        content = self.parts.get(request.object_id, b"")
        return PullObjectResponse(
            object_found=True, object_available=bool(content), object_content=content
        )

    def ConfirmMessageReceived(self, request: ConfirmMessageReceivedRequest) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


@dataclass
class Deployed:
    """As much of Flower's grid of deployed nodes as is needed."""

    _runtime_client: SuperLink
    node: Node = field(default_factory=Node)
    run: Run = field(default_factory=lambda: Run.create_empty(1))


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


@pytest.fixture
def arrivals(superlink) -> Arrivals:
    return Arrivals(Deployed(superlink), largest=10_000)


def announce(superlink: SuperLink, number: int, says: str = "") -> tuple[Message, dict[str, bytes]]:
    """Announce a reply to ``asked-NUMBER``, which itself `says` another; return its parts."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    question = Message(RecordDict(), dst_node_id=number, message_type="train")
    question.metadata.__dict__["_message_id"] = says or f"asked-{number}"
    arrays = arrays_record({"w": np.full(3, number, dtype=np.float32)})
    reply = Message(
        RecordDict({ARRAYS: arrays, "metrics": MetricRecord({"n": number})}), reply_to=question
    )
    reply.metadata.__dict__["_message_id"] = reply.object_id
    superlink.replies[f"asked-{number}"] = reply
    parts = {key: one.deflate() for key, one in get_all_nested_objects(reply).items()}
    return reply, parts


def test_a_reply_is_there_when_its_last_part_is(superlink, arrivals):
    reply, parts = announce(superlink, 7)
    assert len(parts) > 3
    for key, part in parts.items():
        assert arrivals.pull(["asked-7"]) == ([], {})
        assert arrivals.begun == {"asked-7"}
        superlink.parts[key] = part
    ((whole,), lost) = arrivals.pull(["asked-7"])
    assert lost == {}
    assert arrivals.begun == set()
    assert whole.metadata.message_id == reply.object_id
    assert whole.metadata.reply_to_message_id == "asked-7"
    np.testing.assert_array_equal(whole.content[ARRAYS]["w"].numpy(), np.full(3, 7.0))
    assert superlink.confirmed == [reply.object_id]


def test_one_that_is_slow_holds_up_nobody(superlink, arrivals):
    announce(superlink, 1)
    _, parts = announce(superlink, 2)
    superlink.parts |= parts
    (whole, lost) = arrivals.pull(["asked-1", "asked-2"])
    assert [one.metadata.reply_to_message_id for one in whole] == ["asked-2"]
    assert lost == {}
    assert arrivals.begun == {"asked-1"}


def test_one_that_the_superlink_gave_up_is_lost(superlink, arrivals):
    _, parts = announce(superlink, 1)
    first, *rest = parts
    superlink.parts[first] = parts[first]
    assert arrivals.pull(["asked-1"]) == ([], {})
    superlink.given_up = set(rest)
    assert arrivals.pull(["asked-1"]) == ([], {"asked-1": INCOMPLETE})
    assert arrivals.begun == set()


def test_garbage_is_lost_and_named(superlink, arrivals):
    for number in (1, 2):
        _, parts = announce(superlink, number)
        superlink.parts |= parts
    # The parts of the second come as something else, the first ones are in order.
    superlink.parts |= dict.fromkeys(parts, b"Message  9\x00{}")
    (whole, lost) = arrivals.pull(["asked-1", "asked-2"])
    assert [one.metadata.reply_to_message_id for one in whole] == ["asked-1"]
    assert lost.keys() == {"asked-2"}
    assert lost["asked-2"].startswith("unreadable reply: ")


def test_a_reply_that_says_it_answers_another_message_is_lost(superlink, arrivals):
    _, parts = announce(superlink, 1, says="asked-2")
    superlink.parts |= parts
    (whole, lost) = arrivals.pull(["asked-1"])
    assert whole == []
    assert lost == {"asked-1": "unreadable reply: announced as the reply to another message"}


def test_a_reply_of_more_bytes_than_a_reply_may_have_is_given_up(superlink):
    _, parts = announce(superlink, 1)
    superlink.parts |= parts
    small = Arrivals(Deployed(superlink), largest=sum(map(len, parts.values())) - 1)
    assert small.pull(["asked-1"])[1]["asked-1"].startswith("unreadable reply: more than")
    _, parts = announce(superlink, 2)
    superlink.parts |= parts
    fitting = Arrivals(Deployed(superlink), largest=sum(map(len, parts.values())))
    assert len(fitting.pull(["asked-2"])[0]) == 1


def test_many_parts_are_fetched_some_at_a_time_and_each_once(superlink, arrivals, monkeypatch):
    monkeypatch.setattr(module, "_PARTS_AT_ONCE", 2)
    _, parts = announce(superlink, 1)
    superlink.parts |= parts
    asked = []
    pull = superlink.PullObject
    monkeypatch.setattr(
        superlink, "PullObject", lambda request: asked.append(request.object_id) or pull(request)
    )
    looks = 0
    while not (found := arrivals.pull(["asked-1"]))[0]:
        looks += 1
        assert found == ([], {})
        assert len(asked) == 2 * looks
    assert sorted(asked) == sorted(parts)


def test_a_reply_in_another_nodes_name_is_lost(superlink, arrivals):
    _reply, parts = announce(superlink, 1)
    superlink.parts |= parts
    # The SuperLink vouches for the node that announced a reply, not for what the reply says.
    announced = superlink.PullMessages
    superlink.PullMessages = lambda request: of_node(announced(request), 99)
    (whole, lost) = arrivals.pull(["asked-1"])
    assert whole == []
    assert lost == {"asked-1": "unreadable reply: announced as another node's"}


def of_node(answer: PullAppMessagesResponse, node: int) -> PullAppMessagesResponse:
    for said in answer.messages_list:
        said.metadata.src_node_id = node
    return answer


def test_a_reply_of_endless_parts_is_given_up_before_any_is_fetched(superlink, arrivals):
    _reply, _parts = announce(superlink, 1)
    announced = superlink.PullMessages
    superlink.PullObject = lambda request: pytest.fail("fetched")

    def endless(request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        answer = announced(request)
        for tree in answer.message_object_trees:
            tree.children.extend(ObjectTree(object_id=f"{number:064x}") for number in range(10_000))
        return answer

    superlink.PullMessages = endless
    (whole, lost) = arrivals.pull(["asked-1"])
    assert whole == []
    assert lost["asked-1"].startswith("unreadable reply: more than 8192 parts")
    assert arrivals.begun == set()


def test_what_was_not_asked_for_is_passed_over(superlink, arrivals):
    _, parts = announce(superlink, 1)
    superlink.parts |= parts
    announced = superlink.PullMessages

    def twice(request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        answer = announced(request)
        other = PullAppMessagesResponse()
        other.CopyFrom(answer)
        for said in other.messages_list:
            said.metadata.reply_to_message_id = ""
        answer.MergeFrom(other)
        return answer

    superlink.PullMessages = twice
    (whole, lost) = arrivals.pull(["asked-1"])
    assert [one.metadata.reply_to_message_id for one in whole] == ["asked-1"]
    assert lost == {}
