"""What a device may leave with the SuperLink, before Flower's own handlers and store."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import (
    Message,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node

from server.deployment.quota import Quota

MIB = 2**20
RUN, NODE = 5, 6


class State:
    """A SuperLink's state of one run that has begun, and Flower's handlers over it."""

    def __init__(self, began: str = "2999-01-01T00:00:00+00:00", status: str = "running") -> None:
        self.object_store: dict[str, int] = {}
        self.began, self.status = began, status
        self.messages: list[tuple[Message, ObjectTree]] = []
        self.objects: dict[str, bytes] = {}
        self.pushed: list[Message] = []

    def get_run_info(self, run_ids: list[int]) -> list[Any]:
        if run_ids != [RUN]:
            return []
        return [SimpleNamespace(pending_at=self.began, status=SimpleNamespace(status=self.status))]

    def handlers(self) -> Any:
        return SimpleNamespace(
            pull_messages=lambda request, state, store: PullMessagesResponse(
                messages_list=[m for m, _ in self.messages],
                message_object_trees=[t for _, t in self.messages],
            ),
            pull_object=lambda request, state: PullObjectResponse(
                object_content=self.objects[request.object_id]
            ),
            push_messages=self._push_messages,
            push_object=self._push_object,
        )

    def _push_messages(self, request, state):
        self.pushed += request.messages_list
        return PushMessagesResponse()

    def _push_object(self, request, state):
        self.object_store[request.object_id] = len(request.object_content)
        return PushObjectResponse(stored=True)


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def fleet(state: State) -> Any:
    return guarded(state)


def guarded(state: State) -> Any:
    handlers = state.handlers()
    Quota().install(handlers)
    return handlers


def push(
    fleet: Any, state: State, size: int, name: str, *, run: int = RUN, node: int = NODE
) -> None:
    request = PushObjectRequest(
        node=Node(node_id=node), run_id=run, object_id=name, object_content=bytes(size)
    )
    fleet.push_object(request=request, state=state)


def instruct(fleet: Any, state: State, size: int, name: str) -> None:
    """Let the device fetch an instruction of `size` bytes."""
    tree = ObjectTree(object_id="root" + name, children=[ObjectTree(object_id=name)])
    state.objects = {name: bytes(size), "root" + name: b""}
    state.messages = [(Message(metadata=Metadata(run_id=RUN)), tree)]
    node = Node(node_id=NODE)
    fleet.pull_messages(request=PullMessagesRequest(node=node), state=state, store=None)
    for each in state.objects:
        request = PullObjectRequest(node=node, run_id=RUN, object_id=each)
        fleet.pull_object(request=request, state=state)


def test_a_device_stores_no_more_than_twice_what_it_was_sent_and_room_for_the_rest(fleet, state):
    instruct(fleet, state, 30 * MIB, "a")
    for number in range(2 * 30 + 16):
        push(fleet, state, MIB, f"part-{number}")
    with pytest.raises(HTTPException, match="of 79691776 that it may store") as refused:
        push(fleet, state, MIB, "one-more")
    assert refused.value.status_code == 413
    assert sum(state.object_store.values()) == 76 * MIB
    # The server has fetched them: there is room again. Another device has its own.
    state.object_store.clear()
    push(fleet, state, MIB, "more")
    push(fleet, state, MIB, "other", node=NODE + 1)


def test_who_was_sent_nothing_stores_little(fleet, state):
    push(fleet, state, 16 * MIB, "a")
    with pytest.raises(HTTPException):
        push(fleet, state, 1, "b")


def test_fetching_an_instruction_again_and_again_earns_no_more(fleet, state):
    for _ in range(50):
        instruct(fleet, state, MIB, "a")
    push(fleet, state, 16 * MIB, "x")
    push(fleet, state, 2 * MIB, "y")
    with pytest.raises(HTTPException):
        push(fleet, state, 1, "z")


def test_a_smaller_instruction_takes_nothing_away(fleet, state):
    instruct(fleet, state, 30 * MIB, "large")
    instruct(fleet, state, 1, "small")
    push(fleet, state, 70 * MIB, "x")


def test_a_device_that_was_instructed_before_this_superlink_began_is_trusted_with_a_gigabyte():
    state = State(began="2020-01-01T00:00:00+00:00")
    fleet = guarded(state)
    for number in range(16):
        push(fleet, state, 64 * MIB, f"{number}")
    with pytest.raises(HTTPException):
        push(fleet, state, 1, "more")


@pytest.mark.parametrize(("run", "status"), [(RUN + 1, "running"), (RUN, "finished")])
def test_runs_that_do_not_go_on_fill_no_memory(run, status):
    state = State(status=status)
    handlers = state.handlers()
    own = Quota()
    own.install(handlers)
    for number in range(100):
        push(handlers, state, 10, "x", run=run, node=number)
    assert not own._accounts


def reply(**changes: Any) -> PushMessagesRequest:
    metadata = {"run_id": RUN, "src_node_id": NODE, "reply_to_message_id": "a", **changes}
    return PushMessagesRequest(
        node=Node(node_id=NODE),
        messages_list=[Message(metadata=Metadata(**metadata))],
        message_object_trees=[ObjectTree(object_id="t")],
    )


def test_a_device_sends_replies_of_its_own_and_no_more(fleet, state):
    fleet.push_messages(request=reply(), state=state)
    assert len(state.pushed) == 1
    two = reply()
    two.messages_list.append(two.messages_list[0])
    none = reply()
    del none.messages_list[:]
    for forged in (
        # An instruction, as if the server gave it; a reply in another device's name.
        reply(src_node_id=1, reply_to_message_id="", dst_node_id=NODE + 1),
        reply(reply_to_message_id=""),
        reply(src_node_id=NODE + 1),
        two,
        none,
    ):
        with pytest.raises(HTTPException):
            fleet.push_messages(request=forged, state=state)
    assert len(state.pushed) == 1
