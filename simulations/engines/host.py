"""Runs the ClientApp for the clients of one process, as a SuperNode would for each of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.local_state import STATE_FOLDER
from clients.trainer import Passes, Wanted, alone
from clients.trainer import Trained as TrainedPass
from fedkn.direct import Asked, Trained
from fedkn.gpus import GpuFull, full_gpu
from fedkn.text import printable
from simulations.engines.gathering import gathered
from simulations.engines.identity import RUN_ID
from simulations.engines.records import Content, copied

__all__ = ["FIRST_NODE", "Answer", "ClientHost", "Request"]

FIRST_NODE = 1000
"""Node ids are this plus the partition."""


@dataclass(frozen=True)
class Request:
    """What a client is asked: its node, the message or what is asked without one, its state."""

    node: int
    message_type: str
    content: Content
    state: RecordDict

    def copied(self) -> Request:
        """Return the request with a copy of the content that is the client's own."""
        return replace(self, content=copied(self.content))


@dataclass(frozen=True)
class Answer:
    """What came back: the reply's content, or the `error` if there is none, and the new state."""

    content: Content | None
    error: str
    state: RecordDict


class ClientHost:
    """Calls one ClientApp object for client after client.

    Args:
        app: the ClientApp. clients: how many there are. run_config: every client's run config.
        state_folder: where they keep what is their own on disk (empty: in memory).
        train: trains the clients of one call together (None: each by itself, one after another).
        directly: what the ClientApp does in training, without its messages.
    """

    def __init__(
        self,
        app: ClientApp,
        clients: int,
        run_config: Mapping[str, Any],
        train: Callable[[Sequence[Wanted]], Sequence[TrainedPass]] | None = None,
        *,
        directly: Callable[[Asked, Context], Passes[Trained]],
        state_folder: str = "",
    ) -> None:
        self._directly = directly
        self._state_folder = state_folder
        self._app = app
        self._clients = clients
        self._run_config = dict(run_config)
        self._train = train
        self._full = ""
        """Which client found the GPU full, if one did."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the answers to `requests`, whose content is the clients' own from here on.

        Raises:
            GpuFull: this machine's GPU cannot hold what a client needs, which is no client's fault.
        """
        self._full = ""
        asked = [r.content for r in requests if isinstance(r.content, Asked)]
        if self._train is not None and len(asked) == len(requests):
            contexts = [self._context(request) for request in requests]
            found = gathered(list(map(self._directly, asked, contexts)), self._train)
            answers = list(map(self._answer, found, contexts))
        else:
            answers = [self.answer_one(request) for request in requests]
        if self._full:
            reason = printable(self._full.splitlines()[0], 300)
            raise GpuFull(
                f"the GPU's memory did not suffice ({reason}): train fewer clients or cells on it "
                "at once (workers, compare.workers), smaller batches, or a narrower model"
            )
        return answers

    def answer_one(self, request: Request) -> Answer:
        """Return the answer of one client; an exception that it raises is an error answer."""
        context = self._context(request)
        try:
            if isinstance(request.content, Asked):
                return self._answer(alone(self._directly(request.content, context)), context)
            reply = self._app(_message(request), context)
        except Exception as error:  # whatever a client raises is its error reply
            return self._answer(error, context)
        if reply.has_error():
            return Answer(None, reply.error.reason or "no reason given", context.state)
        return Answer(reply.content, "", context.state)

    def _context(self, request: Request) -> Context:
        return Context(
            run_id=RUN_ID,
            node_id=request.node,
            node_config={
                "partition-id": request.node - FIRST_NODE,
                "num-partitions": self._clients,
                STATE_FOLDER: self._state_folder,
            },
            state=request.state,
            run_config=dict(self._run_config),
        )

    def _answer(self, found: Trained | Exception, context: Context) -> Answer:
        if isinstance(found, Exception):
            if full_gpu(found):
                self._full = f"client {context.node_id - FIRST_NODE}: {found}"
            return Answer(None, "".join(traceback.format_exception(found)), context.state)
        return Answer(found, "", context.state)


def _message(request: Request) -> Message:
    assert isinstance(request.content, RecordDict)
    message = Message(request.content, dst_node_id=request.node, message_type=request.message_type)
    message.metadata.__dict__["_message_id"] = f"{request.node:x}"
    return message
