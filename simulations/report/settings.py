"""What the cells of a run have in common, what they differ in, and how each normalizer is built."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

from fedkn import normalizers
from fedkn.normalizers.group import GroupNormalizer
from simulations.runs.axes import settings_of
from simulations.runs.records import CellRecord

__all__ = [
    "NormalizerNote",
    "display_name",
    "held_equal",
    "normalizer_notes",
    "unequal",
    "varied",
]

# What a grid varies on purpose, where each cell keeps its files, and what changes no result.
_AXES = (
    "seed",
    "normalizer.",
    "train.batch_size",
    "train.learning_rate",
    "partition.",
    "checkpoint.",
    "observers.",
    "workers",
)
_MANY_CHANNELS = 1 << 20


@dataclass(frozen=True)
class NormalizerNote:
    """A normalizer of the report: its name, what it is, when not to take it, its source."""

    name: str
    title: str
    not_for: str
    paper: str


@cache
def display_name(name: str, groups: int = 0) -> str:
    """Return the name with its group count: figures of other counts are not comparable."""
    if name not in normalizers.names():
        return name
    normalizer = normalizers.create(name, **({"groups": groups} if groups else {}))
    if not isinstance(normalizer, GroupNormalizer):
        return name
    # Without a count a layer has as many groups as the rule allows it, up to this limit.
    count = str(groups) if groups else f"≤ {normalizer.group_count(_MANY_CHANNELS)}"
    return f"{name} ({count} groups)"


def normalizer_notes(names: Sequence[str], groups: int) -> list[NormalizerNote]:
    """Return a note for each normalizer; those that the registry does not know have empty ones."""
    notes = []
    for name in names:
        known = normalizers.create(name) if name in normalizers.names() else None
        said = (known.title, known.not_for, known.paper) if known else ("", "", "")
        notes.append(NormalizerNote(display_name(name, groups), *said))
    return notes


def held_equal(cells: Sequence[CellRecord]) -> dict[str, object]:
    """Return the settings, by dotted key, that are the same in all cells."""
    return {key: values[0] for key, values in _values(cells).items() if len(values) == 1}


def unequal(cells: Sequence[CellRecord], axes: Collection[str] = ()) -> dict[str, list[object]]:
    """Return the settings that differ between cells though they are no axis of the grid.

    `axes` are the keys of further ones.
    """
    return {
        key: values
        for key, values in _values(cells).items()
        if len(values) > 1 and not varied(key) and key not in axes
    }


def varied(key: str) -> bool:
    """Whether every grid varies the setting with this dotted key, or it changes no result."""
    return key.startswith(_AXES)


def _values(cells: Sequence[CellRecord]) -> dict[str, list[object]]:
    values: dict[str, list[object]] = {}
    # What cannot be trained never learned which engine "auto" is.
    for cell in [cell for cell in cells if cell.status != "untrainable"] or cells:
        for key, value in settings_of(cell.config).items():
            known = values.setdefault(key, [])
            if value not in known:
                known.append(value)
    return values
