"""What tells one set of images from another: digests of every pixel and every label."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Self

from fedkn.data.examples import Examples

__all__ = ["Fingerprint"]

_PARTS = ("training", "validation", "test")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Fingerprint:
    """Digests of the images that a run uses: those trained on, those held for validation, tests.

    Every pixel and every label is hashed (SHA-256), none is sampled: that two sets which differ in
    one of them, in their order or in their division have equal fingerprints is as unlikely as a
    collision of SHA-256. The names of the classes and the images' shape are not in it.

    Attributes:
        training, validation, test: of each part, images with their labels, in order.
        counts: images of each part.
        images: of all images together, in whatever order; labelled: of all images with labels so.
    """

    training: str
    validation: str
    test: str
    counts: tuple[int, int, int]
    images: str
    labelled: str

    @classmethod
    def of(cls, *parts: Examples) -> Self:
        """Return the fingerprint of training, validation and test images; those left out are none.

        Takes 0.3 s for 60,000 images of 3x32x32 (docs/data.md).
        """
        own = [_digests(data) for data in parts]
        own += [[] for _ in _PARTS[len(parts) :]]
        training, validation, test = (_digest(digests) for digests in own)
        every = sorted(digest for digests in own for digest in digests)
        first, second, third = (len(digests) for digests in own)
        return cls(
            training=training,
            validation=validation,
            test=test,
            counts=(first, second, third),
            images=_digest(digest[:_PIXELS] for digest in every),
            labelled=_digest(every),
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return what `to_json` wrote. Raises ValueError if `text` is no fingerprint."""
        data = json.loads(text)
        if not isinstance(data, dict) or set(data) != {field.name for field in fields(cls)}:
            raise ValueError("other fields than those of a fingerprint")
        counts = data.pop("counts")
        if not isinstance(counts, list) or [type(n) for n in counts] != [int] * len(_PARTS):
            raise ValueError("no counts of three parts")
        if not all(isinstance(d, str) and _SHA256.fullmatch(d) for d in data.values()):
            raise ValueError("a digest that is none")
        return cls(counts=(counts[0], counts[1], counts[2]), **data)

    def to_json(self) -> str:
        """Return the fingerprint as one line of JSON."""
        return json.dumps(asdict(self))

    def changes(self, now: Fingerprint) -> list[str]:
        """Return in words in what the images `now` differ from these; nothing if they are equal."""
        if self == now:
            return []
        if self.images == now.images:
            if self.labelled != now.labelled:
                return ["labels"]
            return ["order of the images, or which of them are for training, validation and tests"]
        found = []
        for name, before, after in zip(_PARTS, self.counts, now.counts, strict=True):
            if getattr(self, name) != getattr(now, name):
                number = f" ({before}, now {after})" if before != after else ""
                found.append(f"{name} images{number}")
        return found


def _digests(data: Examples) -> list[bytes]:
    """Return for each image SHA-256 of its pixels, followed by its label (8 bytes)."""
    rows = data.inputs.cpu().contiguous().numpy().reshape(-1).data
    labels = data.targets.cpu().numpy().astype("<i8").tobytes()
    size = len(rows) // max(len(data), 1)
    sha256 = hashlib.sha256
    return [
        sha256(rows[i * size : (i + 1) * size]).digest() + labels[8 * i : 8 * i + 8]
        for i in range(len(data))
    ]


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


_PIXELS = hashlib.sha256().digest_size
