"""Clipping a client's whole update: the bound on what one client can do to the mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fedkn.errors import UserError
from fedkn.training.rule import LocalRule
from fedkn.training.transfer import moved

__all__ = ["CLIP_NORM", "ClippedUpdate", "clip_update"]

CLIP_NORM = "clipping_norm"
"""What the server tells: the norm to which a client is to clip its update, under Flower's name."""

Tensors = Mapping[str, Tensor]


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
        device = next((value.device for value in trained.values()), torch.device("cpu"))
        start = moved({name: received[name] for name in trained}, device)
        return clip_update(trained, start, self.norm)


def clip_update(trained: Tensors, sent: Tensors, norm: float) -> dict[str, Tensor]:
    """Return `sent` + d min(1, `norm`/|d|) with d = `trained` - `sent`, in float64.

    The FlatClip of arXiv 1710.06963, Section 2.2: |d| is the Euclidean norm over all the tensors of
    `sent` together. They keep the shapes and dtypes of `sent`, and are on its device, which nothing
    waits for; tensors of `trained` that `sent` lacks are left out. What is not finite stays so.
    """
    if not sent:
        return {}
    start = torch.cat([value.reshape(-1) for value in sent.values()])
    end = torch.cat([trained[name].detach().reshape(-1) for name in sent])
    move = end.double().sub_(start)
    length = vector_norm(move)
    clipped = move.mul_(norm / length).add_(start).to(end.dtype)
    # Not by a factor of one, which could round.
    flat = torch.where(length <= norm, end, clipped)
    parts = torch.split(flat, [value.numel() for value in sent.values()])
    return {
        name: part.view(value.shape).to(value.dtype)
        for (name, value), part in zip(sent.items(), parts, strict=True)
    }
