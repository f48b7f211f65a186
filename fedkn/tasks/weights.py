"""A weight for each class, as an option of a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["ClassWeights"]


class ClassWeights:
    """Weights that were given for the classes, none of them below zero; false if there are none.

    Raises:
        UserError: they are no such numbers.
    """

    def __init__(self, weights: Any) -> None:
        listed = isinstance(weights, Sequence) and not isinstance(weights, str)
        if not listed or not all(_is_weight(one) for one in weights) or _all_zero(weights):
            raise UserError(
                f"task.options.class_weights = {printable(weights, 60)}: give a number of at least "
                "0 for each class, in their order, such as [1, 2.5]"
            )
        self._weights = tuple(float(one) for one in weights)
        self._made: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._weights)

    def check(self, classes: Sequence[str]) -> None:
        """Raise UserError if there is not one for each of the `classes`."""
        if self and len(self._weights) != len(classes):
            raise UserError(
                f"task.options.class_weights has {len(self._weights)} numbers, but there are "
                f"{len(classes)} classes: give one for each, in the order "
                f"{printable(', '.join(classes), 120)}"
            )

    def on(self, outputs: Tensor) -> Tensor | None:
        """Return the weights (K,) as `outputs` are: its device, its dtype; None without any."""
        if not self:
            return None
        kind = outputs.device, outputs.dtype
        if kind not in self._made:
            # Of what is made in inference mode no gradient could be taken later.
            with torch.inference_mode(mode=False):
                self._made[kind] = torch.tensor(self._weights, device=kind[0], dtype=kind[1])
        return self._made[kind]


def _is_weight(one: Any) -> bool:
    number = isinstance(one, int | float) and not isinstance(one, bool)
    return number and 0 <= one < math.inf


def _all_zero(weights: Sequence[float]) -> bool:
    return bool(weights) and not any(weights)
