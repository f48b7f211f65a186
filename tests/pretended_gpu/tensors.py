"""The tensors in the arguments and results of operations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["as_they_are", "tensors_in"]


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors in lists, tuples and dictionaries, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in tensors_in(part)]


def as_they_are(value: Any) -> Any:
    """Return `value` with aliases of its tensors, whose shapes nobody changes later."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {name: as_they_are(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(as_they_are(part) for part in value)
    return value
