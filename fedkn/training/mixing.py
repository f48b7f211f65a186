"""Whether a network treats every example of a batch by itself: found out by trying."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["refuse_mixing"]


def refuse_mixing(
    model: nn.Module,
    x: Tensor,
    gradient: Callable[[int], Tensor],
    drawn: Callable[[], AbstractContextManager[None]],
) -> None:
    """Raise UserError if what `model`, in training, makes of an example depends on others.

    Two things are tried. The scores of an example in a batch, with the same random draws, must stay
    as they are when all others are replaced. And the gradient of an example alone must be the same
    before and after another went through the model, which a network that keeps something of what
    it has seen would change. An error of the network itself is a refusal too.

    Args:
        x: what the model is given for a few examples, (n, C, H, W).
        gradient: returns the gradient of the i-th of them alone, always with the same draws.
        drawn: a context in which a forward pass has the same draws as ever.
    """
    if not len(x):
        return
    try:
        with torch.no_grad():
            _compare_scores(model, x, drawn)
        before = gradient(0)
        if len(x) > 1:
            gradient(1)
        after = gradient(0)
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = printable(error, 160)
        # Whoever bears too little memory has an answer of its own to that.
        if "memory" in reason.lower():
            raise
        raise UserError(
            f"privacy.mechanism = 'example' cannot train this network on single images: {reason}"
        ) from error
    if not _alike(before, after):
        raise _refusal("an image's gradient changes with those that went through it before")


_TOLERANCE = 1e-4


def _compare_scores(
    model: nn.Module, x: Tensor, drawn: Callable[[], AbstractContextManager[None]]
) -> None:
    # Of a single example there is no batch: its negative makes one.
    batch = x if len(x) > 1 else torch.cat([x, 0.5 - x])
    for i in (0, len(batch) - 1):
        # Other pixels in all other places: the negatives, turned round.
        others = torch.empty_like(batch).copy_((0.5 - batch).flip(-1, -2))
        others[i] = batch[i]
        with drawn():
            scores = model(batch)[i]
        with drawn():
            replaced = model(others)[i]
        if not _alike(scores, replaced):
            raise _refusal("its scores for an image change with the others in the batch")


def _alike(one: Tensor, other: Tensor) -> bool:
    finite = one[torch.isfinite(one)]
    near = _TOLERANCE * float(finite.abs().max()) if len(finite) else 0.0
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=near, equal_nan=True)


def _refusal(what: str) -> UserError:
    return UserError(
        f"privacy.mechanism = 'example' cannot train this network: {what}, so no gradient belongs "
        "to one image and none can be clipped; build or convert it with a normalizer that treats "
        "every image by itself (kernel, group, ws_group, layer, …)"
    )
