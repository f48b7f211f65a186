"""What is signed of a message, and that nothing of it can be other."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedkn.errors import UserError
from fedkn.federation import arrays_record, packed
from fedkn.signatures import (
    SIGNED,
    Instruction,
    content_digest,
    is_signed,
    public_key,
    sign,
)

DIGEST = bytes(range(32))
BASE = Instruction(1, 2, "train", 3, DIGEST)


def content(**config: object) -> RecordDict:
    arrays = arrays_record({"a": np.arange(6.0).reshape(2, 3), "b": np.ones(2, np.float32)})
    told = {"round": 1, "rate": np.float64(0.1), "on": True, "names": ["x", "y"], "raw": b"\0"}
    return RecordDict(
        {
            "arrays": arrays,
            "packed": packed(arrays),
            "config": ConfigRecord({**told, **config}),
            "metrics": MetricRecord({"m": [1.5, 2.5]}),
        }
    )


@pytest.mark.parametrize(
    "other",
    [
        BASE._replace(run_id=2),
        BASE._replace(node_id=1),
        BASE._replace(kind="evaluate"),
        BASE._replace(sequence=4),
        BASE._replace(digest=bytes(32)),
        # The same digits, divided otherwise.
        Instruction(12, 3, "train", 3, DIGEST),
    ],
)
def test_a_signature_is_of_one_instruction_and_one_key(other):
    key = Ed25519PrivateKey.generate()
    signature = sign(key, BASE)
    assert is_signed(key.public_key(), BASE, signature)
    assert not is_signed(key.public_key(), other, signature)
    assert not is_signed(Ed25519PrivateKey.generate().public_key(), BASE, signature)
    assert not is_signed(key.public_key(), BASE, b"")


def test_the_digest_is_the_same_after_the_way_and_without_the_signature():
    sent = content()
    came = recorddict_from_proto(recorddict_to_proto(sent))
    came[SIGNED] = ConfigRecord({"signature": b"x"})
    assert content_digest(came) == content_digest(sent)


def test_any_change_is_another_digest():
    seen = {content_digest(content())}
    for change in ({"round": 2}, {"round": 1.0}, {"on": 1}, {"names": ["x,y"]}, {"more": 1}):
        seen.add(content_digest(content(**change)))
    moved = content()
    moved["other"] = moved.pop("config")
    flat = content()
    flat["arrays"] = arrays_record({"a": np.arange(6.0), "b": np.ones(2, np.float32)})
    last = content()
    array = np.arange(6.0).reshape(2, 3)
    array[1, 2] += 1e-12
    last["arrays"] = arrays_record({"a": array, "b": np.ones(2, np.float32)})
    gone = content()
    gone["packed"] = ArrayRecord()
    seen |= {content_digest(one) for one in (moved, flat, last, gone)}
    assert len(seen) == 1 + 5 + 4


def test_an_array_record_of_many_messages_is_hashed_once():
    one, known = content(), {}
    digest = content_digest(one, known)
    assert len(known) == 2
    # Whoever asks again is answered from there.
    known = dict.fromkeys(known, b"\0")
    assert content_digest(one, known) != digest


def test_a_public_key_is_64_digits():
    key = Ed25519PrivateKey.generate().public_key()
    text = key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
    assert public_key(text) == key
    for wrong in ("", "zz", text[:-2]):
        with pytest.raises(UserError, match="64 hexadecimal digits"):
            public_key(wrong)
