"""What whoever trains a model must know of an experiment's data, without having any of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from fedkn.data.examples import Examples
from fedkn.data.fingerprint import Fingerprint
from fedkn.data.values import INPUT_DTYPES, TARGET_DTYPES, dtype_name
from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["DataSummary"]

ValueT = TypeVar("ValueT", str, int, float)


@dataclass(frozen=True)
class DataSummary:
    """Names of classes, what inputs and targets are, how inputs are scaled, a fingerprint.

    Attributes:
        classes: in the order of the labels; empty where targets have no names.
        shape: of one input: (C, H, W) of an image.
        mean, deviation: of every channel of the training inputs; empty where the experiment's
            scaling does not use them. Of uint8 pixels as in [0, 1], of others as they are.
        fingerprint: of the experiment's examples; None where nobody has told it.
        dtype: of inputs, such as ``uint8`` or ``float32``.
        target_dtype, target_shape: of one target: ``int64`` and () of a class, (H, W) of a mask;
            ``float32`` and () of a number, (K,) of several or of K labels.
    """

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    fingerprint: Fingerprint | None = None
    dtype: str = "uint8"
    target_dtype: str = "int64"
    target_shape: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        data: Examples,
        figures: tuple[Tensor, Tensor] | None = None,
        fingerprint: Fingerprint | None = None,
    ) -> Self:
        """Return the summary of `data`, with `figures` as `channel_statistics` gives them."""
        # Floats hold float32 and float64 numbers exactly.
        mean, deviation = (tuple(one.tolist()) for one in figures) if figures else ((), ())
        return cls(
            data.classes,
            data.shape,
            mean,
            deviation,
            fingerprint,
            dtype_name(data.inputs),
            dtype_name(data.targets),
            tuple(data.targets.shape[1:]),
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return what `to_record` returned.

        Raises:
            ValueError: the record is not one of a summary.
        """
        classes, shape = _tuple(record, "classes", str), _tuple(record, "shape", int)
        mean, deviation = (_tuple(record, key, float) for key in ("mean", "deviation"))
        target_shape = _tuple(record, "target_shape", int)
        # What earlier versions did not tell were images and labels.
        dtype, target_dtype = record.get("dtype", "uint8"), record.get("target_dtype", "int64")
        if not isinstance(dtype, str) or not isinstance(target_dtype, str):
            raise ValueError("it does not say what the data are like")
        figures = {len(mean), len(deviation)}
        if (
            not 1 <= len(shape) <= _MOST_AXES
            or len(target_shape) > _MOST_AXES
            or min(*shape, *target_shape, 1) < 1
            or figures not in ({0}, {shape[0]})
            or dtype not in _INPUTS
            or target_dtype not in _TARGETS
            or (len(classes) < 2 and (target_dtype, target_shape) == ("int64", ()))
        ):
            raise ValueError("it does not say what the data are like")
        told = record.get("fingerprint")
        fingerprint = None if told is None else Fingerprint.from_json(json.dumps(told))
        return cls(classes, shape, mean, deviation, fingerprint, dtype, target_dtype, target_shape)

    def to_record(self) -> dict[str, Any]:
        """Return the summary as JSON can hold it."""
        return asdict(self)

    @property
    def identity(self) -> str:
        """Twelve hexadecimal digits by which people can tell these data from others."""
        parts = [self.classes, self.shape, self.fingerprint and asdict(self.fingerprint)]
        # What images with labels have always been is not told.
        kinds = (self.dtype, self.target_dtype, self.target_shape)
        told = json.dumps(parts if kinds == _IMAGES else [*parts, *kinds])
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:12]

    def changes(self, now: DataSummary) -> list[str]:
        """Return in words in what the data `now` differ from these; nothing if they are equal.

        What one of the two does not tell is not compared.
        """
        found = []
        if self.classes != now.classes:
            found.append(f"class names ({_listed(self.classes)}; now {_listed(now.classes)})")
        if (self.dtype, self.shape) != (now.dtype, now.shape):
            what = "images" if len(self.shape) == len(now.shape) == _IMAGE_AXES else "inputs"
            found.append(f"shape of the {what} ({self.inputs}, now {now.inputs})")
        if (self.target_dtype, self.target_shape) != (now.target_dtype, now.target_shape):
            found.append(f"kind of targets ({self.targets}, now {now.targets})")
        if self.fingerprint and now.fingerprint:
            found += self.fingerprint.changes(now.fingerprint)
        return found

    @property
    def inputs(self) -> str:
        """What one input is, in words: ``3x32x32`` of uint8, ``float32 12`` of other types."""
        shape = _sides(self.shape)
        return shape if self.dtype == "uint8" else f"{self.dtype} {shape}"

    @property
    def targets(self) -> str:
        """What one target is, in words: ``a class``, ``int64 32x32``, ``float32``."""
        if (self.target_dtype, self.target_shape) == ("int64", ()):
            return "a class"
        return f"{self.target_dtype} {_sides(self.target_shape)}".strip()

    def conformed(self, own: Examples) -> Examples:
        """Return the examples `own` with classes in the order of these, matched by name.

        `own` may lack classes.

        Raises:
            UserError: inputs or targets of another kind, or classes that are not among these,
                naming both.
        """
        strange = [name for name in own.classes if name not in self.classes]
        if strange or (self.classes and not own.classes):
            found = f"classes that the experiment lacks: {_listed(strange)}" if strange else "none"
            raise UserError(
                f"has {found}. The experiment's are "
                f"{_listed(self.classes)}; those here are {_listed(own.classes)}: name them as the "
                "experiment does (folders, or the array 'classes' of an .npz)"
            )
        here = DataSummary.of(own)
        if len(self.shape) == 3 and len(here.shape) == 3:
            self._check_images(here)
        if (here.dtype, here.shape) != (self.dtype, self.shape):
            raise UserError(
                f"has inputs of {here.dtype} {_sides(here.shape)}, but the experiment of "
                f"{self.dtype} {_sides(self.shape)}: store them alike"
            )
        floating = here.target_dtype == "float32"
        columns = floating and bool(own.classes) and here.target_shape == (len(own.classes),)
        wanted = (len(self.classes),) if columns else here.target_shape
        if (here.target_dtype, wanted) != (self.target_dtype, self.target_shape):
            raise UserError(
                f"has other targets ({here.targets}) than the experiment ({self.targets}): store "
                "them alike"
            )
        if own.classes == self.classes:
            return own
        places = torch.tensor([self.classes.index(name) for name in own.classes])
        if columns:
            targets = own.targets.new_zeros(len(own), len(self.classes))
            targets[:, places] = own.targets
        else:
            known = (own.targets >= 0) & (own.targets < len(places))
            renamed = places[own.targets.clamp(0, len(places) - 1)]
            targets = torch.where(known, renamed, own.targets)
        return replace(own, targets=targets, classes=self.classes)

    def _check_images(self, here: DataSummary) -> None:
        """Say what is wrong in the words of images."""
        channels, height, width = self.shape
        if here.shape[0] != channels:
            raise UserError(f"has {here.shape[0]} channel(s), but the experiment {channels}")
        if here.shape[1:] != (height, width):
            raise UserError(
                f"has images of {_sides(here.shape[1:])} pixels, but the experiment of "
                f"{height}x{width}: resize them"
            )


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


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


_SHOWN = 20
_MOST_AXES = 4
_IMAGE_AXES = 3
_IMAGES = ("uint8", "int64", ())
_INPUTS = frozenset(str(dtype).removeprefix("torch.") for dtype in INPUT_DTYPES)
_TARGETS = frozenset(str(dtype).removeprefix("torch.") for dtype in TARGET_DTYPES)
