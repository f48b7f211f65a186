"""Replies of deployed nodes, each fetched part by part as it arrives.

A node announces a reply and then uploads its parts. Flower's grid, asked for replies, waits for all
parts of one that was announced: until its node has been silent for three minutes, whatever the
deadline, while nobody else's are fetched. The only file here that reaches into Flower's grid.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from flwr.app import Message
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
)
from flwr.superlink.grid import HttpGrid

from fedkn.text import printable
from server.object_graph import check_objects, most_parts

__all__ = ["INCOMPLETE", "Arrivals"]

# A look at a reply with many parts must not outlast the deadline of a round.
_PARTS_AT_ONCE = 64
INCOMPLETE = "only part of its reply came: a slow line, a part over the size limit, or node gone"


class Arrivals:
    """The replies to the messages of a round, on their way through `grid`."""

    def __init__(self, grid: HttpGrid, largest: int) -> None:
        """`largest`: bytes that a reply may have, sent and inflated; beyond, it is given up."""
        self._largest = largest
        self._client = grid._runtime_client
        self._node = grid.node
        self._run_id = grid.run.run_id
        self._begun: dict[str, _Reply] = {}

    @property
    def begun(self) -> set[str]:
        """The ids of the messages whose replies have come in part."""
        return set(self._begun)

    def pull(self, ids: Iterable[str]) -> tuple[list[Message], dict[str, str]]:
        """Return the replies to the messages `ids` that are whole by now, without waiting.

        The second part has, by the id of its message, why a reply will never be.
        """
        new = [one for one in ids if one not in self._begun]
        answer = self._client.PullMessages(PullAppMessagesRequest(message_ids=new))
        whole: list[Message] = []
        lost: dict[str, str] = {}
        most = most_parts(self._largest)
        for said, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            asked = said.metadata.reply_to_message_id
            if asked not in new or asked in self._begun:
                continue
            ids = islice((one.object_id for one in iterate_object_tree(tree)), most + 1)
            parts = dict.fromkeys(ids)
            if len(parts) > most:
                lost[asked] = f"unreadable reply: more than {most} parts"
                continue
            self._begun[asked] = _Reply(
                said.metadata.message_id, said.metadata.src_node_id, deque(parts)
            )
        for asked, reply in list(self._begun.items()):
            try:
                self._fetch(reply)
                if reply.missing:
                    continue
                whole.append(self._opened(asked, reply))
            except ObjectPullError:
                lost[asked] = INCOMPLETE
            except ValueError as error:
                lost[asked] = printable(f"unreadable reply: {error}")
            del self._begun[asked]
        return whole, lost

    def _fetch(self, reply: _Reply) -> None:
        """Fetch what has come of `reply`, some parts at a time: others' are waiting too."""
        for _ in range(_PARTS_AT_ONCE):
            # Nodes send parts in this order, so that none lies ready behind one that is not there.
            if not reply.missing or not (part := self._part(reply.missing[0])):
                return
            reply.contents[reply.missing.popleft()] = part
            reply.size += len(part)
            if reply.size > self._largest:
                raise ValueError(f"more than {self._largest} bytes")

    def _part(self, object_id: str) -> bytes:
        """Return a part, empty where it has not come."""
        answer = self._client.PullObject(
            PullObjectRequest(node=self._node, run_id=self._run_id, object_id=object_id)
        )
        if not answer.object_found:
            raise ObjectPullError(object_id, "the SuperLink has given it up")
        return answer.object_content

    def _opened(self, asked: str, reply: _Reply) -> Message:
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=self._run_id, message_object_id=reply.message_id
            )
        )
        try:
            check_objects(reply.message_id, reply.contents, self._largest)
            message = inflate_object_from_contents(reply.message_id, reply.contents)
        except Exception as error:  # what a client sends may break any parser, but not the round
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if not isinstance(message, Message):
            raise ValueError(f"a {type(message).__name__} instead of a message")
        # The SuperLink looked at what was announced alone.
        if message.metadata.reply_to_message_id != asked:
            raise ValueError("announced as the reply to another message")
        if message.metadata.src_node_id != reply.node_id:
            raise ValueError("announced as another node's")
        message.metadata.__dict__["_message_id"] = reply.message_id
        return message


@dataclass
class _Reply:
    """A reply that was announced: its parts by id, and the ids of those that have not come."""

    message_id: str
    node_id: int
    missing: deque[str]
    contents: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
