"""What is drawn for an example depends on that example alone, not on those beside it.

Where augmentation and dropout follow from an example's place in a batch, one more example moves all
later ones to other draws, and the sum of clipped gradients by far more than the one that was added.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import torch
from torch import Tensor

__all__ = ["example_names"]


def example_names(images: Tensor, labels: Tensor) -> list[str]:
    """Return a name for each example that no other example changes, beyond equal ones.

    A name is the BLAKE2b digest of the image's bytes and its label, and a count that tells equal
    examples apart: n equal ones have the counts 0 to n - 1. So the names of a data set without one
    of its examples are the names of the whole but one, whichever example it is.

    Args:
        images: uint8, (N, C, H, W). labels: int64, (N,).
    """
    seen: Counter[str] = Counter()
    names = []
    shape = repr(tuple(images.shape[1:])).encode()
    pixels = images.detach().to("cpu", torch.uint8).contiguous().numpy()
    for image, label in zip(pixels, labels.tolist(), strict=True):
        digest = hashlib.blake2b(shape, digest_size=16)
        digest.update(b"%d:" % label)
        digest.update(image.tobytes())
        name = digest.hexdigest()
        names.append(f"{name}-{seen[name]}")
        seen[name] += 1
    return names
