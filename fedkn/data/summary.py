"""What whoever trains a model must know of an experiment's images, without having any of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeVar

import torch

from fedkn.data.examples import Examples
from fedkn.data.fingerprint import Fingerprint
from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["DataSummary"]

ValueT = TypeVar("ValueT", str, int, float)


@dataclass(frozen=True)
class DataSummary:
    """Names of classes, shape of an image, the figures of ``standardized`` scaling, a fingerprint.

    Pixels are uint8 in every source, so no dtype need be told.

    Attributes:
        classes: in the order of the labels. shape: channels, height and width.
        mean, deviation: of every channel of the training images, of pixels in [0, 1]; empty where
            the experiment's scaling does not use them.
        fingerprint: of the experiment's images; None where nobody has told it.
    """

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    fingerprint: Fingerprint | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return what `to_record` returned.

        Raises:
            ValueError: the record is not one of a summary.
        """
        classes, shape = _tuple(record, "classes", str), _tuple(record, "shape", int)
        mean, deviation = (_tuple(record, key, float) for key in ("mean", "deviation"))
        figures = {len(mean), len(deviation)}
        if (
            len(classes) < 2
            or len(shape) != 3
            or min(shape) < 1
            or figures not in ({0}, {shape[0]})
        ):
            raise ValueError("it does not say what the images are like")
        told = record.get("fingerprint")
        fingerprint = None if told is None else Fingerprint.from_json(json.dumps(told))
        channels, height, width = shape
        return cls(classes, (channels, height, width), mean, deviation, fingerprint)

    def to_record(self) -> dict[str, Any]:
        """Return the summary as JSON can hold it."""
        return asdict(self)

    @property
    def identity(self) -> str:
        """Twelve hexadecimal digits by which people can tell these data from others."""
        told = json.dumps([self.classes, self.shape, self.fingerprint and asdict(self.fingerprint)])
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:12]

    def changes(self, now: DataSummary) -> list[str]:
        """Return in words in what the data `now` differ from these; nothing if they are equal.

        What one of the two does not tell is not compared.
        """
        found = []
        if self.classes != now.classes:
            found.append(f"class names ({_listed(self.classes)}; now {_listed(now.classes)})")
        if self.shape != now.shape:
            before, after = ("x".join(map(str, shape)) for shape in (self.shape, now.shape))
            found.append(f"shape of the images ({before}, now {after})")
        if self.fingerprint and now.fingerprint:
            found += self.fingerprint.changes(now.fingerprint)
        return found

    def conformed(self, own: Examples) -> Examples:
        """Return the images `own` with labels in the order of these classes, matched by name.

        `own` may lack classes.

        Raises:
            UserError: images of another shape, or classes that are not among these, naming both.
        """
        strange = [name for name in own.classes if name not in self.classes]
        if strange:
            raise UserError(
                f"has classes that the experiment lacks: {_listed(strange)}. The experiment's are "
                f"{_listed(self.classes)}; those here are {_listed(own.classes)}: name them as the "
                "experiment does (folders, or the array 'classes' of an .npz)"
            )
        channels, height, width = self.shape
        if own.in_channels != channels:
            raise UserError(f"has {own.in_channels} channel(s), but the experiment {channels}")
        if own.image_size != (height, width):
            ours = "x".join(map(str, own.image_size))
            raise UserError(
                f"has images of {ours} pixels, but the experiment of {height}x{width}: resize them"
            )
        if own.classes == self.classes:
            return own
        places = torch.tensor([self.classes.index(name) for name in own.classes])
        return Examples(own.inputs, places[own.targets], self.classes)


def _tuple(record: Mapping[str, Any], key: str, kind: type[ValueT]) -> tuple[ValueT, ...]:
    value = record.get(key, [])
    if not isinstance(value, list | tuple):
        raise ValueError(f"it has no list '{key}'")
    if any(type(one) is not kind for one in value):
        raise ValueError(f"it has no list of {kind.__name__} '{key}'")
    return tuple(value)


def _listed(names: list[str] | tuple[str, ...]) -> str:
    more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(name) for name in names[:_SHOWN]) + more


_SHOWN = 20
