"""A Flower grid whose clients are the real ClientApp, and whose wire does what a test wants.

Written against Flower's Grid alone, so that it is independent of fedkn's engines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from clients.app import app as client_app
from fedkn.config import ExperimentConfig
from server.run import Outcome, run_server

FIRST_NODE = 500

# (round, partition, message as sent, honest reply) -> what arrives at the server instead
Tamper = Callable[[int, int, Message, Message], Iterable[Message]]


def small(**changes: Any) -> ExperimentConfig:
    """Return a federation on the digits that takes a fraction of a second for each round."""
    settings = {
        "rounds": 2,
        "cohort": 3,
        "partition.clients": 6,
        "partition.scheme": "iid",
        "data.test_limit": 60,
        "train.local_steps": 3,
        "model.width": 4,
        "normalizer.name": "group",
        "model.final_norm": "none",
        "device": "cpu",
        "server.join_timeout": 1.0,
    }
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return ExperimentConfig.resolve(settings, dotted)


def run(config: ExperimentConfig, tamper: Tamper | None = None) -> Outcome:
    """Run `config` with honest clients, whose training replies pass through `tamper`."""
    return run_server(FakeGrid(config, tamper), config)


class Crash(BaseException):
    """The server's process ends in the middle of a round."""


def crashed(config: ExperimentConfig, in_round: int) -> FakeGrid:
    """Return the grid of a run whose server crashed when a round's first reply came.

    Its clients live on with what they keep, and are honest from then on.
    """

    def crash(round_: int, p: int, message: Message, reply: Message) -> Iterable[Message]:
        if round_ == in_round:
            raise Crash
        return [reply]

    grid = FakeGrid(config, crash)
    with pytest.raises(Crash):
        run_server(grid, config)
    grid._tamper = None
    return grid


class ScriptedGrid(Grid):
    """A grid of `nodes`, every message of which is answered by `respond`."""

    def __init__(
        self, nodes: Iterable[int], respond: Callable[[Message], Iterable[Message]]
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.nodes = list(nodes)
        self.respond = respond
        self._ids = itertools.count(1)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies: list[Message] = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._ids)}"
            replies.extend(self.respond(message))
        return replies

    def get_nodes(self) -> Iterable[NodeInfo]:
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


class FakeGrid(ScriptedGrid):
    """Nodes FIRST_NODE + partition, which run the ClientApp."""

    def __init__(self, config: ExperimentConfig, tamper: Tamper | None = None) -> None:
        clients = config.partition.clients
        super().__init__(range(FIRST_NODE, FIRST_NODE + clients), self._deliver)
        self._tamper = tamper
        self._contexts = {
            FIRST_NODE + partition: Context(
                run_id=1,
                node_id=FIRST_NODE + partition,
                node_config={"partition-id": partition, "num-partitions": clients},
                state=RecordDict(),
                run_config=config.flat(),
            )
            for partition in range(clients)
        }

    def _deliver(self, message: Message) -> Iterable[Message]:
        node = message.metadata.dst_node_id
        try:
            reply = client_app(message, self._contexts[node])
        except Exception as error:
            reply = Message(Error(1, f"Traceback …\n{error}"), reply_to=message)
        if self._tamper is None or message.metadata.message_type != MessageType.TRAIN:
            return [reply]
        round_ = message.content.config_records["config"]["server-round"]
        assert isinstance(round_, int)
        return self._tamper(round_, node - FIRST_NODE, message, reply)
