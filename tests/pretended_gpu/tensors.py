"""The tensors in the arguments and results of operations."""

from __future__ import annotations

from torch import Tensor

__all__ = ["tensors_in"]


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors in lists, tuples and dictionaries, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple):
        return []
    return [tensor for part in value for tensor in tensors_in(part)]
