"""A Flower grid whose nodes are calls of the ClientApp object on this machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run

from clients.local_state import Kept, Room
from fedkn.direct import Asked, Trained
from fedkn.stack import Flat, Layout
from server.wire import DirectGrid, Order
from simulations.engines.crew import Crew
from simulations.engines.host import FIRST_NODE, Answer, ClientHost, Request
from simulations.engines.identity import RUN_ID

__all__ = ["InProcessGrid"]


class InProcessGrid(DirectGrid):
    """The grid of the `inprocess` and `batched` engines.

    Nodes have consecutive ids in the order of their partitions. A client gets its own copy of what
    it is sent, and its state is kept between messages; an exception becomes an error reply. Clients
    train without messages: what they are sent lies on the device that they train on, and so do
    their updates.

    Args:
        host: runs clients in this process. crew: does so in worker processes as well.
        sizes: number of examples of every client: large ones are started first.
        device: what this process's clients train on.
        group: how many clients train together. Who trains with whom follows from `sizes` and the
            cohort alone, not from the number of processes.
    """

    def __init__(
        self,
        host: ClientHost,
        crew: Crew,
        sizes: Sequence[int],
        device: torch.device,
        *,
        group: int = 1,
    ) -> None:
        self._device = device
        self._host = host
        self._crew = crew
        self._sizes = sizes
        self._group = group
        # Only of clients who have any: most never keep a thing.
        self._states: dict[int, Kept] = {}
        self._room = Room()
        self._run = Run.create_empty(RUN_ID)
        self._replies: dict[str, Message] = {}
        self._ids = itertools.count(1)

    def set_run(self, run: Run) -> None:
        """Set the run's information."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to node `dst_node_id`."""
        return Message(
            content,
            dst_node_id=dst_node_id,
            message_type=message_type,
            ttl=ttl,
            group_id=group_id,
        )

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return range(FIRST_NODE, FIRST_NODE + len(self._sizes))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver `messages`, running the clients, and return their ids."""
        return self._deliver(list(messages), None)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to the messages with these ids, each once."""
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run the clients and return their replies in the order of `messages`.

        After `timeout` seconds clients in worker processes are ended, with error replies; those in
        this process cannot be interrupted.
        """
        return self.pull_messages(self._deliver(list(messages), timeout))

    def train(self, order: Order, timeout: float | None) -> dict[int, Trained | str]:
        """Let the clients of `order` train, as `send_and_receive` does."""
        sent = Flat.sent(Layout(order.tensors, order.parameters), order.tensors).to(self._device)
        control = None
        if order.control:
            control = Flat.sent(Layout(order.control), order.control).to(self._device)
        nodes = {node: partition for partition, node in order.nodes.items()}
        groups = [
            [
                Request(
                    node,
                    MessageType.TRAIN,
                    Asked({**order.told, **order.own[nodes[node]]}, order.data, sent, control),
                    self._state(node),
                )
                for node in group
            ]
            for group in self._groups(nodes)
        ]
        found: dict[int, Trained | str] = {}
        for requests, answers in zip(groups, self._crew.answer(groups, timeout), strict=True):
            for request, answer in zip(requests, answers, strict=True):
                self._keep(request.node, answer)
                content = answer.content
                assert content is None or isinstance(content, Trained)
                found[nodes[request.node]] = answer.error if content is None else content
        self._host.make_durable()
        return {partition: found[partition] for partition in order.nodes}

    def _deliver(self, messages: Sequence[Message], timeout: float | None) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"{next(self._ids):x}"
        heavy: dict[int, list[Message]] = {}
        for message in messages:
            if message.metadata.message_type.startswith(_HEAVY):
                heavy.setdefault(message.metadata.dst_node_id, []).append(message)
            else:
                self._reply(message, self._host.answer_one(self._request(message).copied()))
        groups = [[m for node in group for m in heavy[node]] for group in self._groups(heavy)]
        requests = [[self._request(message) for message in group] for group in groups]
        for group, answers in zip(groups, self._crew.answer(requests, timeout), strict=True):
            for message, answer in zip(group, answers, strict=True):
                self._reply(message, answer)
        return [message.metadata.message_id for message in messages]

    def _groups(self, nodes: Iterable[int]) -> list[list[int]]:
        """Return who trains with whom, clients by falling size: no long one is begun last."""
        ordered = sorted(nodes, key=self._rank)
        return [ordered[i : i + self._group] for i in range(0, len(ordered), self._group)]

    def _rank(self, node: int) -> tuple[int, int]:
        partition = node - FIRST_NODE
        known = 0 <= partition < len(self._sizes)
        return (-self._sizes[partition] if known else 0, node)

    def _state(self, node: int) -> Kept:
        return self._states.get(node) or Kept(self._room)

    def _request(self, message: Message) -> Request:
        node = message.metadata.dst_node_id
        return Request(node, message.metadata.message_type, message.content, self._state(node))

    def _reply(self, message: Message, answer: Answer) -> None:
        self._keep(message.metadata.dst_node_id, answer)
        if answer.content is None:
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, answer.error)
            reply = Message(error, reply_to=message)
        else:
            assert isinstance(answer.content, RecordDict)
            reply = Message(answer.content, reply_to=message)
        self._replies[message.metadata.message_id] = reply

    def _keep(self, node: int, answer: Answer) -> None:
        if answer.state:
            self._states[node] = answer.state
        else:
            self._states.pop(node, None)


_HEAVY = (MessageType.TRAIN, MessageType.EVALUATE)
