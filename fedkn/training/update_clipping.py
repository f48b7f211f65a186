"""Clipping a client's whole update: the bound on what one client can do to the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fedkn.errors import UserError
from fedkn.training.rule import LocalRule

__all__ = ["CLIP_NORM", "ClippedUpdate", "clip_update", "update_norm"]

CLIP_NORM = "clipping_norm"
"""What the server tells: the norm to which a client is to clip its update, under Flower's name."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ClippedUpdate(LocalRule):
    """Sends an update clipped by `clip_update`: the client half of client-level privacy.

    It is for ``privacy.mechanism = client_…``; the server half is `PrivateMean`, in
    `server/strategies/differential_privacy.py`.
    """

    norm: float

    @classmethod
    def of(cls, told: Mapping[str, Any], given: Mapping[str, Tensor]) -> Self:
        """Return the rule for the norm that the server tells."""
        del given
        norm = told.get(CLIP_NORM)
        if not isinstance(norm, float):
            raise UserError(f"the server's message has no float '{CLIP_NORM}'")
        return cls(norm)

    def sent(
        self, trained: Mapping[str, Tensor], received: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the shared tensors, moved no further than the norm from those received."""
        clipped = clip_update(
            {name: value.detach().cpu().numpy() for name, value in trained.items()},
            {name: received[name].cpu().numpy() for name in trained},
            self.norm,
        )
        return {name: torch.from_numpy(value) for name, value in clipped.items()}


def update_norm(trained: Arrays, sent: Arrays) -> float:
    """Return the Euclidean norm, in float64, of `trained` - `sent` over the tensors of `sent`."""
    squares = (
        float(np.square(trained[name].astype(np.float64) - start).sum())
        for name, start in sent.items()
    )
    return math.sqrt(sum(squares))


def clip_update(trained: Arrays, sent: Arrays, norm: float) -> dict[str, np.ndarray]:
    """Return `sent` + d min(1, `norm`/|d|) with d = `trained` - `sent`, |d| its `update_norm`.

    The FlatClip of arXiv 1710.06963, Section 2.2. The arrays keep the shapes and dtypes of `sent`;
    tensors of `trained` that `sent` lacks are left out. What is not finite stays so.
    """
    length = update_norm(trained, sent)
    if length <= norm:
        return {name: trained[name] for name in sent}
    return {
        name: np.asarray(
            start + (trained[name].astype(np.float64) - start) * (norm / length), start.dtype
        )
        for name, start in sent.items()
    }
