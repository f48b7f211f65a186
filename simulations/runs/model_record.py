"""What a run's record says of how its model came about: whose it is, what was changed and frozen.

The field ``model`` of a cell's ``start`` line (docs/run-folder.md), which older runs lack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedkn.text import printable

__all__ = ["ConversionRecord", "ModelRecord", "is_model", "model_of"]


@dataclass(frozen=True)
class ConversionRecord:
    """What `fedkn.convert` did: the first few hundred layers, and how many there were.

    Attributes:
        changed: (layer, what it was, what it is, note). kept: (layer, what it is, reason).
        all_changed, all_kept: how many layers. traced: whether the data flow was followed.
    """

    changed: tuple[tuple[str, str, str, str], ...]
    kept: tuple[tuple[str, str, str], ...]
    all_changed: int
    all_kept: int
    traced: bool


@dataclass(frozen=True)
class ModelRecord:
    """How a cell's model came about.

    Attributes:
        parameters: of the model, in elements. trained: of these, those that are trained.
        frozen: names of tensors kept as they were built, the first of `frozen_tensors`.
        weights_sha256: of the file of weights that it started from (empty: none).
        left: tensors not taken from that file, the first few.
        alone: why its clients cannot be trained together, stacked; empty if they can.
        conversion: None where the model was built with its normalizer.
    """

    parameters: int
    trained: int
    frozen: tuple[str, ...]
    frozen_tensors: int
    weights_sha256: str
    left: tuple[str, ...]
    alone: str
    conversion: ConversionRecord | None


def model_of(start: Mapping[str, Any]) -> ModelRecord | None:
    """Return what a ``start`` line says of the model, printable; None where it says nothing."""
    told = start.get("model")
    if told is None:
        return None
    weights, converted = told.get("weights") or {}, told.get("conversion")
    conversion = None
    if converted is not None:
        conversion = ConversionRecord(
            changed=tuple(_row(row) for row in converted["changed"]),
            kept=tuple(_row(row) for row in converted["kept"]),
            all_changed=converted["all_changed"],
            all_kept=converted["all_kept"],
            traced=converted["traced"],
        )
    return ModelRecord(
        parameters=told["parameters"],
        trained=told["trained"],
        frozen=_row(told["frozen"]),
        frozen_tensors=told["frozen_tensors"],
        weights_sha256=printable(weights.get("sha256", ""), 64),
        left=_row(weights.get("left", ())),
        alone=printable(told["alone"]),
        conversion=conversion,
    )


def is_model(value: Any) -> bool:
    """Whether `value` is what a ``start`` line may say of the model."""
    return (
        isinstance(value, dict)
        and all(_is_count(value.get(key)) for key in ("parameters", "trained", "frozen_tensors"))
        and value["trained"] <= value["parameters"]
        and isinstance(value.get("alone"), str)
        and _is_row(value.get("frozen"))
        and ("weights" not in value or _is_weights(value["weights"]))
        and ("conversion" not in value or _is_conversion(value["conversion"]))
    )


_MOST = 1000
_LARGEST = 2**53


def _is_weights(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("sha256"), str)
        and _is_row(value.get("left"))
    )


def _is_conversion(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_table(value.get("changed"), 4)
        and _is_table(value.get("kept"), 3)
        and all(_is_count(value.get(key)) for key in ("all_changed", "all_kept"))
        and isinstance(value.get("traced"), bool)
    )


def _is_table(value: Any, columns: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MOST
        and all(_is_row(row) and len(row) == columns for row in value)
    )


def _is_row(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MOST
        and all(isinstance(text, str) for text in value)
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _row(texts: Any) -> Any:
    return tuple(printable(text, 200) for text in texts)
