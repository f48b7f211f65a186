"""What the server of a fleet signs, so that a device knows who instructs it: Ed25519, RFC 8032."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedkn.errors import UserError

__all__ = [
    "SEQUENCE",
    "SIGNATURE",
    "SIGNED",
    "Instruction",
    "content_digest",
    "is_signed",
    "public_key",
    "sign",
]

# The record of a message that holds the signature, and its two entries.
SIGNED, SEQUENCE, SIGNATURE = "signed", "sequence", "signature"

# Another use of the same key could not be taken for an instruction.
_PURPOSE = b"fedkn instruction 1\n"


class Content(Protocol):
    """The content of a message: Flower's RecordDict, whose records are mappings by name."""

    @property
    def array_records(self) -> Any:
        """Records of arrays, each with dtype, shape, stype and data."""

    @property
    def metric_records(self) -> Any:
        """Records of numbers, and lists of them."""

    @property
    def config_records(self) -> Any:
        """Records of numbers, text and bytes, and lists of them."""


class Instruction(NamedTuple):
    """What is signed of a message: for whom it is, where it belongs, and its content.

    `kind` is the message's type, `sequence` larger in every later message of a run (so that an old
    one is known when it comes again), `digest` the SHA-256 of the content.
    """

    run_id: int
    node_id: int
    kind: str
    sequence: int
    digest: bytes

    def canonical(self) -> bytes:
        """Return the bytes that are signed; no two instructions have the same."""
        fields = (self.run_id, self.node_id, self.sequence, self.digest.hex(), self.kind)
        return _PURPOSE + "\n".join(map(str, fields)).encode()


def content_digest(content: Content, known: dict[int, bytes] | None = None) -> bytes:
    """Return the SHA-256 of all records of a message but `SIGNED`: names, types and values.

    It is the same before a message is sent and after it has come. `known` has the digests of array
    records by their `id`, and is given those that it lacks.
    """
    known = {} if known is None else known
    digests: list[tuple[str, str, bytes]] = []
    for name, arrays in content.array_records.items():
        if id(arrays) not in known:
            known[id(arrays)] = _arrays_digest(arrays)
        digests.append((name, "arrays", known[id(arrays)]))
    for kind in ("metric_records", "config_records"):
        for name, record in getattr(content, kind).items():
            if name != SIGNED:
                values = sorted((key, _plain(value)) for key, value in record.items())
                digests.append((name, kind, hashlib.sha256(repr(values).encode()).digest()))
    return hashlib.sha256(repr(sorted(digests)).encode()).digest()


def sign(key: Ed25519PrivateKey, instruction: Instruction) -> bytes:
    """Return the signature (64 bytes) of `instruction`."""
    return key.sign(instruction.canonical())


def is_signed(key: Ed25519PublicKey, instruction: Instruction, signature: bytes) -> bool:
    """Return whether `signature` is that of `instruction`, made with the private key of `key`."""
    try:
        key.verify(signature, instruction.canonical())
    except InvalidSignature:
        return False
    return True


def public_key(text: str) -> Ed25519PublicKey:
    """Return the public key written as 64 hexadecimal digits. Raises UserError if it is none."""
    try:
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
    except ValueError:
        raise UserError(
            "server_key is no key of 64 hexadecimal digits: copy it from the device.toml that "
            "fedkn deploy init made"
        ) from None


def _arrays_digest(arrays: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        head = (name, array.dtype, tuple(array.shape), array.stype, len(array.data))
        digest.update(repr(head).encode())
        digest.update(array.data)
    return digest.digest()


def _plain(value: object) -> str:
    """Return a value as Python writes it, which tells types apart; a NumPy number as Python's."""
    if isinstance(value, list):
        return repr([_plain(one) for one in value])
    if isinstance(value, bytes):
        return repr(bytes(value))
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return repr(kind(value))
    raise TypeError(f"a record cannot hold {type(value).__name__}")
