"""Who instructs a device: a mod of the ClientApp that lets pass what the fleet's server signed.

The SuperLink delivers whatever claims to come from it, also from another device. A node whose
config has a ``server-key`` does only what is signed with that key for this very node and run, and
nothing a second time. A simulated client has no such key and asks for no signature.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable

from fedkn.errors import UserError
from fedkn.signatures import (
    SEQUENCE,
    SIGNATURE,
    SIGNED,
    Instruction,
    content_digest,
    is_signed,
    public_key,
)

__all__ = ["SERVER_KEY", "signed_by_the_server"]

SERVER_KEY = "server-key"
"""Key of the node's config: the public key of the fleet's server, in hexadecimal digits."""


def signed_by_the_server(
    message: Message, context: Context, call_next: ClientAppCallable
) -> Message:
    """Pass `message` on if the server signed it, or if this node knows no server's key.

    Raises:
        UserError: it is not signed, or by somebody else, or for another node or run, or comes
            again. Nothing of it was looked at.
    """
    key = context.node_config.get(SERVER_KEY)
    if key:
        _check(message, context, str(key))
    return call_next(message, context)


def _check(message: Message, context: Context, key: str) -> None:
    if not message.has_content():
        raise UserError("refused: an instruction without content")
    content = message.content
    record = content.config_records.get(SIGNED, ConfigRecord())
    sequence, signature = record.get(SEQUENCE), record.get(SIGNATURE)
    if type(sequence) is not int or not isinstance(signature, bytes):
        raise UserError("refused: an instruction that the fleet's server did not sign")
    instruction = Instruction(
        context.run_id,
        context.node_id,
        message.metadata.message_type,
        sequence,
        content_digest(content),
    )
    if not is_signed(public_key(key), instruction, signature):
        raise UserError(
            "refused: an instruction whose signature is not the fleet's server's, or that was "
            "meant for another device or run"
        )
    seen = context.state.config_records.get(_SEEN, ConfigRecord())
    if seen.get(_RUN) == str(context.run_id) and sequence <= _whole(seen.get(SEQUENCE)):
        raise UserError("refused: an instruction that has come before")
    context.state[_SEEN] = ConfigRecord({_RUN: str(context.run_id), SEQUENCE: sequence})


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


# Record of the node's state: the last instruction that was taken.
_SEEN, _RUN = "fedkn-instructions", "run"
