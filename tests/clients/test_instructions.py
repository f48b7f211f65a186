"""A device does what its server signed, for it and now; a simulated client asks for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from clients.app import app
from clients.instructions import SERVER_KEY, signed_by_the_server
from fedkn.errors import UserError
from fedkn.signatures import SEQUENCE, SIGNATURE, SIGNED
from server.signing import SIGNING_KEY, sign_messages

RUN, NODE = 7, 2**64 - 5


@pytest.fixture
def server_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    key = Ed25519PrivateKey.generate()
    path = tmp_path / "signing.key"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    monkeypatch.setenv(SIGNING_KEY, str(path))
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def context(key: str = "", run: int = RUN, node: int = NODE) -> Context:
    config: dict[str, str | int] = {"partition-id": 0}
    if key:
        config[SERVER_KEY] = key
    return Context(run_id=run, node_id=node, node_config=config, state=RecordDict(), run_config={})


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages need a process that has one."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, RUN)


def message(node: int = NODE, kind: str = "query", **config: int) -> Message:
    told = RecordDict({"config": ConfigRecord({"round": 1, **config})})
    return Message(told, dst_node_id=node, message_type=kind)


def signed(run: int = RUN, **settings: int) -> Message:
    TaskIdentity._run_id = run
    one = message(**settings)
    sign_messages([one])
    return one


done = ClientApp(mods=[signed_by_the_server])


@done.query()
def answer(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


@done.train()
def trained(message: Message, context: Context) -> Message:
    return Message(RecordDict(), reply_to=message)


def test_what_the_server_signed_is_done(server_key):
    own = context(server_key)
    assert done(signed(), own).has_content()
    assert done(signed(), own).has_content()


def test_a_simulated_client_asks_for_no_signature():
    assert done(message(), context()).has_content()


def test_a_server_without_a_key_signs_nothing(monkeypatch):
    monkeypatch.delenv(SIGNING_KEY, raising=False)
    assert SIGNED not in signed().content


def test_forged_instructions_are_refused(server_key, tmp_path, monkeypatch):
    own = context(server_key)
    honest = signed()
    changed = signed()
    changed.content["config"]["round"] = 2
    later = signed()
    later.content[SIGNED][SEQUENCE] += 1
    odd = signed()
    odd.content[SIGNED] = ConfigRecord({SEQUENCE: "1", SIGNATURE: 1})
    trains = message(kind="train")
    trains.content[SIGNED] = honest.content[SIGNED]
    other = Ed25519PrivateKey.generate()
    (tmp_path / "other.key").write_bytes(
        other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    monkeypatch.setenv(SIGNING_KEY, str(tmp_path / "other.key"))
    by_another = signed()
    for forged in (message(), changed, later, odd, trains, by_another):
        with pytest.raises(UserError, match="refused: an instruction"):
            done(forged, own)
    assert done(honest, own).has_content()


def test_an_instruction_for_another_device_or_run_is_refused(server_key):
    for one, own in (
        (signed(node=NODE - 1), context(server_key)),
        (signed(run=RUN + 1), context(server_key)),
        (signed(), context(server_key, node=NODE - 1)),
    ):
        with pytest.raises(UserError, match="another device or run"):
            done(one, own)


def test_an_instruction_is_done_once_and_none_before_it(server_key):
    own = context(server_key)
    early, late = signed(), signed()
    assert done(late, own).has_content()
    for again in (late, early):
        with pytest.raises(UserError, match="has come before"):
            done(again, own)
    # Another run begins anew.
    other = context(server_key, run=RUN + 1)
    other.state = own.state
    assert done(signed(run=RUN + 1), other).has_content()


def test_the_clientapp_of_every_kind_of_message_checks(server_key):
    for kind in ("query", "train", "evaluate"):
        with pytest.raises(UserError, match="did not sign"):
            app(message(kind=kind), context(server_key))
