"""Who may send how much to the Fleet API, decided by a call's headers before its body is read.

Flower's SuperLink reads and parses a body first and looks at its signature then. This stands before
it: a registered device, which its headers prove, may send parts of arrays; anybody else a few
kilobytes, which Flower refuses by its own rules. So many bodies are in memory at once, and no more.
"""

from __future__ import annotations

import asyncio
import binascii
import json
import logging
from base64 import b64decode
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import datetime
from typing import Any

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.concurrency import run_in_threadpool

__all__ = ["LARGEST_CALL", "LARGEST_PART", "Admission"]

LARGEST_PART = 16 * 2**20
"""Bytes that a registered device may send in a call of push-object, which carries arrays."""

LARGEST_CALL = 2**20
"""Bytes that it may send in any other call; the tree of a reply of 3 GiB has as many."""

_STRANGERS = 4096
_SMALL = 64 * 2**10
_AT_ONCE = 16
_BODY_SECONDS = 300.0

_LOG = logging.getLogger("flwr")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Admission:
    """ASGI middleware: the outermost of the SuperLink's.

    A body is refused by the length that its headers declare, unread; one without a declared length
    is refused too. Of bodies over 64 KiB sixteen are read at once, each in 300 s at most; the next
    wait, which their senders bear.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._turn = asyncio.Semaphore(_AT_ONCE)
        # Keys that are registered; Flower itself finds out about those that no longer are.
        self._known: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on with its body read, or refuse it."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/fleet/"):
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value for key, value in scope["headers"]}
        try:
            length = int(headers.get("content-length", b""))
        except ValueError:
            await _refuse(send, 411, "a call without a content-length")
            return
        if length > _STRANGERS and not await run_in_threadpool(self._is_registered, scope, headers):
            await _refuse(send, 401, "Invalid SuperNode authentication")
            return
        most = LARGEST_PART if scope["path"] == "/v1/fleet/push-object" else LARGEST_CALL
        if length > most:
            await _refuse(send, 413, f"a message of {length} bytes: {most} are taken")
            return
        if length <= _SMALL:
            await self._app(scope, receive, send)
            return
        async with self._turn:
            try:
                async with asyncio.timeout(_BODY_SECONDS):
                    body = await _body(receive)
            except TimeoutError:
                await _refuse(send, 408, f"no whole message within {_BODY_SECONDS:.0f} s")
                return
            await self._app(scope, _again(body, receive), send)

    def _is_registered(self, scope: Scope, headers: dict[str, bytes]) -> bool:
        """Whether the headers are signed, just now, with the key of a registered device."""
        try:
            key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
            signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
            signed = headers[TIMESTAMP_HEADER]
            age = (now() - datetime.fromisoformat(signed.decode("ascii"))).total_seconds()
            late = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
            if not -SYSTEM_TIME_TOLERANCE < age < late:
                return False
            # The cheap question first: a stranger is to cost no more than a look.
            if key not in self._known:
                state = scope["app"].state.linkstate_factory.state()
                if state.get_node_id_by_public_key(key) is None:
                    return False
            if not verify_signature(bytes_to_public_key(key), signed, signature):
                return False
        except (KeyError, ValueError, TypeError, binascii.Error):
            return False
        self._known.add(key)
        return True


async def _body(receive: Receive) -> bytes | None:
    """Return a call's body; None where its sender is gone."""
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes | None, receive: Receive) -> Receive:
    """Return a `receive` that yields `body` once, then what comes after it."""
    whole: list[Message] = (
        [{"type": "http.disconnect"}]
        if body is None
        else [{"type": "http.request", "body": body, "more_body": False}]
    )

    async def replayed() -> Message:
        return whole.pop() if whole else await receive()

    return replayed


async def _refuse(send: Send, status: int, reason: str) -> None:
    _LOG.warning("a call was refused before it was read: %d, %s", status, reason)
    content = json.dumps({"detail": reason}).encode()
    # The body was not read: the connection cannot be used again.
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
