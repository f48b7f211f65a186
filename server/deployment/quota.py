"""What a device may leave with the SuperLink: replies of its own, and no more than it was sent.

Flower stores what any device of the fleet pushes: as much as it likes, instructions to other
devices too, and replies in others' names.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fastapi import HTTPException
from flwr.common.constant import Status
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.object_store import ObjectStore

__all__ = ["Quota"]

_LOG = logging.getLogger("flwr")

# As much as the server takes of a reply (server/gate/exchange.py): twice what was sent, and room
# for metrics and names.
_TIMES, _ROOM = 2, 2**24
# A device that was instructed by a SuperLink before this one: nobody knows what it was sent.
_UNKNOWN = 2**30
# From so many accounts on those of finished runs are forgotten, before there is another.
_MANY = 1000


@dataclass
class _Account:
    """What a device was sent in its instruction of now, by object, and what it has stored."""

    allowed: int
    sent: dict[str, int] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)

    def limit(self) -> int:
        return max(self.allowed, _TIMES * sum(self.sent.values()) + _ROOM)


class Quota:
    """Stands before Flower's handlers of the Fleet API; see `install`."""

    def __init__(self) -> None:
        self._began = datetime.now(UTC)
        self._accounts: dict[tuple[int, int], _Account] = {}
        self._lock = threading.Lock()

    def install(self, handlers: Any) -> None:
        """Put this before four functions of `handlers`, Flower's module ``fleet_handlers``."""
        for name in ("pull_messages", "pull_object", "push_messages", "push_object"):
            setattr(handlers, name, _before(getattr(self, name), getattr(handlers, name)))

    def pull_messages(
        self,
        honest: Callable[..., PullMessagesResponse],
        request: PullMessagesRequest,
        state: LinkState,
        store: ObjectStore,
    ) -> PullMessagesResponse:
        """Note what the next instruction consists of."""
        answer = honest(request=request, state=state, store=store)
        for message, tree in zip(answer.messages_list, answer.message_object_trees, strict=False):
            account = self._account(message.metadata.run_id, request.node.node_id, state)
            with self._lock:
                account.allowed = account.limit()
                account.sent = dict.fromkeys(_ids(tree), 0)
        return answer

    def pull_object(
        self,
        honest: Callable[..., PullObjectResponse],
        request: PullObjectRequest,
        state: LinkState,
        **rest: Any,
    ) -> PullObjectResponse:
        """Note how large a part of the instruction is."""
        answer = honest(request=request, state=state, **rest)
        account = self._account(request.run_id, request.node.node_id, state)
        with self._lock:
            if request.object_id in account.sent:
                account.sent[request.object_id] = len(answer.object_content)
        return answer

    def push_messages(
        self,
        honest: Callable[..., PushMessagesResponse],
        request: PushMessagesRequest,
        state: LinkState,
    ) -> PushMessagesResponse:
        """Refuse what is no reply, or one in another's name."""
        for message in request.messages_list:
            metadata = message.metadata
            if not metadata.reply_to_message_id or metadata.src_node_id != request.node.node_id:
                _refuse(403, request.node.node_id, "a device sends replies of its own, no more")
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            _refuse(400, request.node.node_id, "one reply and what it consists of")
        return honest(request=request, state=state)

    def push_object(
        self,
        honest: Callable[..., PushObjectResponse],
        request: PushObjectRequest,
        state: LinkState,
    ) -> PushObjectResponse:
        """Refuse what goes beyond the device's quota.

        What is there already is stored: its answer was lost, and the device asks once more.
        """
        account = self._account(request.run_id, request.node.node_id, state)
        size = len(request.object_content)
        with self._lock:
            if sum(account.stored.values()) + size > account.limit():
                # What was fetched, or cleared with its run, no longer counts.
                there = state.object_store
                account.stored = {k: n for k, n in account.stored.items() if k in there}
            held = sum(account.stored.values())
            if held + size > account.limit():
                limit = account.limit()
                text = f"{held + size} bytes stored in a run, of {limit} that it may store"
                _refuse(413, request.node.node_id, text)
            # Counted before it is stored, so that calls at once do not pass together.
            account.stored[request.object_id] = size
        answer = honest(request=request, state=state)
        if not answer.stored:
            answer.stored = state.object_store.get(request.object_id) == request.object_content
        if not answer.stored:
            with self._lock:
                account.stored.pop(request.object_id, None)
        return answer

    def _account(self, run_id: int, node_id: int, state: LinkState) -> _Account:
        key = (run_id, node_id)
        with self._lock:
            account = self._accounts.get(key)
        if account is not None:
            return account
        runs = state.get_run_info(run_ids=[run_id])
        if not runs or runs[0].status.status == Status.FINISHED:
            # Nothing is stored for such a run, and nobody is to fill this memory with names of it.
            return _Account(_ROOM)
        known = datetime.fromisoformat(runs[0].pending_at) > self._began
        if len(self._accounts) >= _MANY:
            self._forget_finished(state)
        with self._lock:
            return self._accounts.setdefault(key, _Account(_ROOM if known else _UNKNOWN))

    def _forget_finished(self, state: LinkState) -> None:
        with self._lock:
            runs = {run_id for run_id, _ in self._accounts}
        states = state.get_run_status(runs)
        with self._lock:
            for key in list(self._accounts):
                if key[0] not in states or states[key[0]].status == Status.FINISHED:
                    del self._accounts[key]


def _before(check: Callable[..., Any], honest: Callable[..., Any]) -> Callable[..., Any]:
    def handler(**arguments: Any) -> Any:
        return check(honest, **arguments)

    return handler


def _ids(tree: ObjectTree) -> list[str]:
    found, left = [], [tree]
    while left:
        one = left.pop()
        found.append(one.object_id)
        left += one.children
    return found


def _refuse(status: int, node_id: int, reason: str) -> None:
    _LOG.warning("node %d is refused: %s", node_id, reason)
    raise HTTPException(status, reason)
