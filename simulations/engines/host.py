"""Runs the ClientApp for the clients of one process, as a SuperNode would for each of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.local_state import STATE_FOLDER, Kept, Room
from clients.trainer import Passes, Wanted, alone
from clients.trainer import Trained as TrainedPass
from fedkn.direct import Asked, Trained
from fedkn.errors import UserError
from fedkn.files import make_durable
from fedkn.gpus import GpuFull, full_gpu
from fedkn.stack import Layout
from fedkn.text import printable
from simulations.engines.gathering import gathered
from simulations.engines.identity import RUN_ID
from simulations.engines.records import Content, copied

__all__ = ["FIRST_NODE", "Answer", "ClientHost", "Request", "layout_of"]

FIRST_NODE = 1000
"""Node ids are this plus the partition."""


@dataclass(frozen=True)
class Request:
    """What a client is asked: its node, the message or what is asked without one, its state."""

    node: int
    message_type: str
    content: Content
    state: Kept

    def copied(self) -> Request:
        """Return the request with a copy of the content that is the client's own."""
        return replace(self, content=copied(self.content))


@dataclass(frozen=True)
class Answer:
    """What came back: the reply's content, or the `error` if there is none, and the new state."""

    content: Content | None
    error: str
    state: Kept


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
        # Where there is a folder: of each client what it last kept there, to be read no more.
        self._kept: dict[int, Kept] = {}
        self._room = Room()
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
            answers = list(map(self._answer, found, requests))
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
                return self._answer(alone(self._directly(request.content, context)), request)
            reply = self._app(_message(request), context)
        except Exception as error:  # whatever a client raises is its error reply
            return self._answer(error, request)
        if reply.has_error():
            return Answer(None, reply.error.reason or "no reason given", request.state)
        return Answer(reply.content, "", request.state)

    def make_durable(self) -> None:
        """See to it that what clients have left in the state folder outlives a power cut.

        Raises:
            UserError: the disk failed.
        """
        folder = Path(self._state_folder)
        if not self._state_folder or not folder.is_dir():
            return
        try:
            make_durable(folder)
        except OSError as error:
            raise UserError(f"cannot write in '{folder}': {error.strerror or error}") from None

    def _state(self, request: Request) -> Kept:
        if not self._state_folder:
            return request.state
        return self._kept.setdefault(request.node, Kept(self._room))

    def _context(self, request: Request) -> Context:
        return Context(
            run_id=RUN_ID,
            node_id=request.node,
            node_config={
                "partition-id": request.node - FIRST_NODE,
                "num-partitions": self._clients,
                STATE_FOLDER: self._state_folder,
            },
            state=self._state(request),
            run_config=dict(self._run_config),
        )

    def _answer(self, found: Trained | Exception, request: Request) -> Answer:
        if isinstance(found, Exception):
            if full_gpu(found):
                self._full = f"client {request.node - FIRST_NODE}: {found}"
            return Answer(None, "".join(traceback.format_exception(found)), request.state)
        return Answer(found, "", request.state)


def layout_of(requests: Sequence[Request]) -> Layout | None:
    """Return the layout in which a group is asked for its updates; None where messages ask."""
    contents = (request.content for request in requests)
    return next((c.sent.layout for c in contents if isinstance(c, Asked)), None)


def _message(request: Request) -> Message:
    assert isinstance(request.content, RecordDict)
    message = Message(request.content, dst_node_id=request.node, message_type=request.message_type)
    message.metadata.__dict__["_message_id"] = f"{request.node:x}"
    return message
