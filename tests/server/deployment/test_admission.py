"""Who may send how much, before a byte of it is read."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from server.deployment import admission
from server.deployment.admission import LARGEST_CALL, LARGEST_PART, Admission

KEY = ec.generate_private_key(ec.SECP384R1())
STRANGER = ec.generate_private_key(ec.SECP384R1())
PUSH, OTHER = "/v1/fleet/push-object", "/v1/fleet/push-messages"


class State:
    """A SuperLink that knows one key."""

    asked = 0

    def get_node_id_by_public_key(self, key: bytes) -> int | None:
        self.asked += 1
        return 1 if key == public_key_to_bytes(KEY.public_key()) else None


class Caller:
    """A call of `length` bytes, of which it counts those that were read."""

    def __init__(self, length: int, seconds: float = 0.0) -> None:
        self.left, self.read, self.seconds = length, 0, seconds
        self.status = 0

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(self.seconds)
        part = min(self.left, 65536)
        self.left -= part
        self.read += part
        return {"type": "http.request", "body": bytes(part), "more_body": self.left > 0}

    async def send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)


class SuperLink:
    """What stands behind: reads the whole body, and counts how many it reads at once."""

    def __init__(self) -> None:
        self.state = State()
        self.admission = Admission(self)
        self.bodies: list[int] = []
        self.now = self.most = 0
        self.release = asyncio.Event()
        self.release.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        await self.release.wait()
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        self.bodies.append(len(body))
        self.now -= 1
        await send({"type": "http.response.start", "status": 200})

    async def call(self, caller: Caller, path: str, headers: dict[str, str]) -> int:
        factory = SimpleNamespace(state=lambda: self.state)
        scope = {
            "type": "http",
            "path": path,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
            "app": SimpleNamespace(state=SimpleNamespace(linkstate_factory=factory)),
        }
        await self.admission(scope, caller.receive, caller.send)
        return caller.status


def signed(key: ec.EllipticCurvePrivateKey, length: int, age: float = 0.0) -> dict[str, str]:
    time = (datetime.now(UTC) - timedelta(seconds=age)).isoformat()
    return {
        "content-length": str(length),
        "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": time,
        "flwr-signature": b64encode(sign_message(key, time.encode())).decode(),
    }


def ask(length: int, headers: dict[str, str], path: str = PUSH) -> tuple[int, int, State]:
    """Return the answer's status, the bytes that were read for it, and the state asked."""

    async def one() -> tuple[int, int, State]:
        link, caller = SuperLink(), Caller(length)
        return await link.call(caller, path, headers), caller.read, link.state

    return asyncio.run(one())


def test_the_headers_are_flowers():
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore import constant

    assert set(signed(KEY, 1)) == {
        "content-length",
        TIMESTAMP_HEADER,
        constant.FLEET_HTTP_PUBLIC_KEY_HEADER,
        constant.FLEET_HTTP_SIGNATURE_HEADER,
    }


def test_a_registered_device_sends_parts_of_arrays():
    assert ask(LARGEST_PART, signed(KEY, LARGEST_PART))[:2] == (200, LARGEST_PART)
    assert ask(LARGEST_CALL, signed(KEY, LARGEST_CALL), OTHER)[:2] == (200, LARGEST_CALL)


def tampered(header: str) -> Callable[[int], dict[str, str]]:
    return lambda length: {**signed(KEY, length), header: "AAAA"}


@pytest.mark.parametrize(
    "headers",
    [
        lambda length: signed(STRANGER, length),
        lambda length: {"content-length": str(length)},
        lambda length: signed(KEY, length, age=310),
        lambda length: signed(KEY, length, age=-10),
        lambda length: {
            **signed(STRANGER, length),
            "flwr-public-key": signed(KEY, 1)["flwr-public-key"],
        },
        *map(tampered, ("flwr-public-key", "flwr-signature", "flwr-timestamp")),
        lambda length: {**signed(KEY, length), "flwr-timestamp": "ü"},
    ],
)
def test_of_anybody_else_not_a_byte_is_read(headers):
    length = 15_900_000
    assert ask(length, headers(length))[:2] == (401, 0)
    # But for what is small: why it is refused is Flower's to say.
    assert ask(4096, headers(4096))[:2] == (200, 4096)


def test_a_strangers_signature_is_not_even_computed(monkeypatch):
    def never(*arguments: object) -> bool:
        raise AssertionError("it was")

    monkeypatch.setattr(admission, "verify_signature", never)
    assert ask(10**7, signed(STRANGER, 10**7))[0] == 401


@pytest.mark.parametrize(
    ("length", "path"), [(LARGEST_PART + 1, PUSH), (LARGEST_CALL + 1, OTHER), (10**12, PUSH)]
)
def test_too_large_a_body_is_not_read(length, path):
    assert ask(length, signed(KEY, length), path)[:2] == (413, 0)


@pytest.mark.parametrize("length", ["", "-1x", "1e3"])
def test_a_body_without_a_length_is_not_read(length):
    headers = {**signed(KEY, 1), "content-length": length}
    assert ask(10**6, headers)[:2] == (411, 0)
    del headers["content-length"]
    assert ask(10**6, headers)[:2] == (411, 0)


def test_other_calls_are_none_of_its_business():
    assert ask(10**6, {}, "/v1/runtime/push-object")[:2] == (200, 10**6)


def test_so_many_bodies_are_in_memory_and_the_others_wait():
    async def many() -> tuple[int, int, list[int]]:
        link = SuperLink()
        link.release.clear()
        callers = [Caller(2**20) for _ in range(40)]
        calls = [asyncio.create_task(link.call(one, PUSH, signed(KEY, 2**20))) for one in callers]
        while link.most < 16:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        read = sum(one.read for one in callers)
        # A small call is not kept waiting.
        link.release.set()
        await asyncio.gather(*calls)
        return link.most, read, link.bodies

    most, read, bodies = asyncio.run(many())
    assert most == 16
    assert read == 16 * 2**20
    assert bodies == [2**20] * 40


def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(admission, "_BODY_SECONDS", 0.2)

    async def slow() -> int:
        link = SuperLink()
        return await link.call(Caller(2**20, seconds=0.1), PUSH, signed(KEY, 2**20))

    assert asyncio.run(slow()) == 408
