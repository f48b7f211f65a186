"""What is pushed to a SuperLink whose answers are lost arrives all the same: Flower's own state."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers

from server.deployment.quota import Quota
from server.gate import exchange as module
from server.gate.exchange import exchange
from tests.server.deployment.test_disk import a_run, link_state
from tests.server.fake_grid import ScriptedGrid


class Superlink:
    """A SuperLink's API in this process. Of the pushes numbered in `lost` the answer is lost."""

    def __init__(self, state, run_id):
        self.state, self.task = state, SimpleNamespace(run_id=run_id)
        self.lost = set()
        self.pushed = []

    def PushMessages(self, request):  # noqa: N802 - Flower's name
        return runtime_handlers.push_messages(request, self.state, self.task)

    def PushObject(self, request):  # noqa: N802 - Flower's name
        self.pushed.append(request.object_id)
        if len(self.pushed) in self.lost:
            runtime_handlers.push_object(request, self.state, self.task)
        return runtime_handlers.push_object(request, self.state, self.task)


@pytest.fixture
def superlink(tmp_path):
    state = link_state(tmp_path / "state.db")
    return Superlink(state, a_run(state, 0, finished=False))


@pytest.fixture
def grid(superlink, monkeypatch):
    ScriptedGrid([], lambda message: [])  # messages need a process that has an identity
    monkeypatch.setattr(module, "sign_messages", lambda messages: None)
    grid = HttpGrid(token="t")
    grid._run, grid._client = SimpleNamespace(run_id=superlink.task.run_id), superlink
    return grid


def questions(run_id, count=2):
    content = [RecordDict({"a": ArrayRecord([np.full(9, float(n))])}) for n in range(count)]
    messages = [Message(each, SUPERLINK_NODE_ID, "query") for each in content]
    for message in messages:
        message.metadata.__dict__["_run_id"] = run_id
        message.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
    return messages


def complete(superlink, messages):
    """Whether all that the messages consist of is with the SuperLink, and no push goes on."""
    store = superlink.state.object_store
    trees = [store.get_object_tree(message.metadata.message_id) for message in messages]
    ids = {one for tree in trees for one in ids_of(tree)}
    return len(ids) > len(messages) and all(store.get(one) for one in ids)


def ids_of(tree):
    return [tree.object_id, *(one for child in tree.children for one in ids_of(child))]


def test_a_part_whose_answer_is_lost_is_not_pushed_twice(grid, superlink):
    messages = questions(superlink.task.run_id)
    superlink.lost = {2}
    exchange(grid, messages, 5.0)
    assert complete(superlink, messages)
    assert superlink.pushed.count(superlink.pushed[1]) == 1
    stored = superlink.state.get_message_ins(SUPERLINK_NODE_ID, None)
    ids = [[message.metadata.message_id for message in those] for those in (stored, messages)]
    assert sorted(ids[0]) == sorted(ids[1])


def test_a_push_that_took_too_long_is_made_again(grid, superlink, monkeypatch):
    messages = questions(superlink.task.run_id)
    now, late = sql_corestate.now, [False]
    later = timedelta(seconds=sql_corestate.OBJECT_PUSH_SESSION_TTL_SECONDS + 1)
    monkeypatch.setattr(sql_corestate, "now", lambda: now() + later * late[0])
    honest = superlink.PushMessages

    def slow(request):
        answer = honest(request)
        late[0] = not late[0]
        return answer

    superlink.PushMessages = slow
    exchange(grid, messages, 5.0)
    assert complete(superlink, messages)


def test_what_is_never_taken_is_an_error(grid, superlink):
    superlink.lost = set(range(1, 1000))
    with pytest.raises(ObjectPushError):
        exchange(grid, questions(superlink.task.run_id, count=20), 5.0)


def test_a_device_whose_answer_was_lost_has_stored_its_part(superlink):
    """Flower's SuperNode gives a reply up of which one part is not taken."""
    state, run_id = superlink.state, superlink.task.run_id
    taken = []

    def honest(request, state):
        taken.append(state.store_object(run_id, "", request.object_id, request.object_content))
        return PushObjectResponse(stored=taken[-1])

    fleet = SimpleNamespace(pull_messages=None, pull_object=None, push_messages=None)
    fleet.push_object = honest
    Quota().install(fleet)

    def push(part):
        content = ConfigRecord({"part": part}).deflate()
        name = get_object_id(content)
        request = PushObjectRequest(
            node=Node(node_id=7), run_id=run_id, object_id=name, object_content=content
        )
        return fleet.push_object(request=request, state=state).stored

    there = get_object_id(ConfigRecord({"part": 1}).deflate())
    state.object_store.preregister(run_id, ObjectTree(object_id=there))
    assert not push(1)  # announced in no session
    state.object_store.put(there, ConfigRecord({"part": 1}).deflate())
    assert push(1)
    assert not push(2)
    assert taken == [False] * 3
