"""Bytes, values and text changed at random, by a generator that its caller seeds."""

from __future__ import annotations

import math
import random
from typing import Any

__all__ = ["NUMBERS", "TEXTS", "mutated", "mutated_bytes", "mutated_json"]

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 7, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 10**12, 10**30, 10**400),
    *(0.0, -0.0, 0.5, 2.5, 1e-320, 1e30, 3.4e38, 1e300, 1.7e308),
    *(math.nan, math.inf, -math.inf, True, False),
)
TEXTS = (
    *("", " ", "\n", "\t\n", "\u2028", "\x1c", "\0", "\x1b[2J\x1b[1;1H", "\x9b2J", "\ud800"),
    *("x\nINFO : round 1/1: 6 of 6 updates", "\u202egnirts", "<script>alert(1)</script>"),
    *("$\\frac$", "[bold]", "../../etc/passwd", "nul\0byte", "=1+1", "é\U0001f991" * 50),
    *("k" * 300, "word " * 2000),
)


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return `data` with one to four changes: bits, bytes, slices."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 4, 16, 256))
        match rng.randrange(7):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + length] = rng.randbytes(length)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = rng.randbytes(length)
            case 4:
                changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
            case 5:
                del changed[at:]
            case _:
                word = rng.choice(
                    (b"\0", b"\xff" * 8, b"[" * 5000, b"9" * 400, b"null", b"{}", b'"')
                )
                changed[at:at] = word
    return bytes(changed)


def mutated(rng: random.Random, value: Any) -> Any:
    """Return something in the place of a `value`: near it, or nothing like it."""
    match rng.randrange(6):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.choice(TEXTS)
        case 2:
            return rng.choice((None, [], {}, [value], {"x": value}, [[value]] * 3, [value] * 1000))
        case 3 if isinstance(value, (int, float)) and not isinstance(value, bool):
            # Beyond every double it stays whole.
            near = float(value) if abs(value) < 1e300 else value
            return rng.choice((-value, value + 1, near * 10**9, near, str(value)))
        case 4 if isinstance(value, str):
            return value[: rng.randrange(len(value) + 1)] + rng.choice(TEXTS)
        case _:
            return nested(rng.choice((3, 40, 2000)), value)


def nested(depth: int, value: Any) -> Any:
    """Return `value` in so many lists."""
    for _ in range(depth):
        value = [value]
    return value


def mutated_json(rng: random.Random, value: Any) -> Any:
    """Return a copy of a value of JSON with something changed somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        match rng.randrange(10):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(TEXTS)] = rng.choice((changed[key], rng.choice(NUMBERS)))
            case 2:
                changed[rng.choice(TEXTS)] = changed.pop(key)
            case _:
                changed[key] = mutated_json(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        changed_list = list(value)
        match rng.randrange(8):
            case 0:
                del changed_list[at]
            case 1:
                changed_list[at:at] = [value[at]] * rng.choice((1, 2, 300))
            case _:
                changed_list[at] = mutated_json(rng, value[at])
        return changed_list
    return mutated(rng, value)
