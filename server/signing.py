"""The server's signature on what it asks of devices. Only a fleet's server has a key for it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import ConfigRecord, Message

from fedkn.errors import UserError
from fedkn.signatures import SEQUENCE, SIGNATURE, SIGNED, Instruction, content_digest, sign

__all__ = ["SIGNING_KEY", "sign_messages"]

SIGNING_KEY = "FEDKN_SIGNING_KEY"
"""Environment variable of a fleet's ServerApps: the file of the key that signs instructions."""


def sign_messages(messages: Sequence[Message]) -> None:
    """Add to the content of each of `messages` the server's signature, if this server has a key.

    An array record that several of them share is hashed once.

    Raises:
        UserError: the key cannot be read.
    """
    path = os.environ.get(SIGNING_KEY)
    if path is None:
        return
    key = _key(path)
    known: dict[int, bytes] = {}
    for message in messages:
        # Nanoseconds since 1970 rise from message to message, over restarts too.
        sequence = time.time_ns()
        instruction = Instruction(
            message.metadata.run_id,
            message.metadata.dst_node_id,
            message.metadata.message_type,
            sequence,
            content_digest(message.content, known),
        )
        message.content[SIGNED] = ConfigRecord(
            {SEQUENCE: sequence, SIGNATURE: sign(key, instruction)}
        )


@lru_cache(maxsize=1)
def _key(path: str) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(Path(path).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"'{path}' cannot be read as the key that signs: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"'{path}' is not the key that fedkn deploy init made")
    return key
