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


def example_names(examples: Tensor, targets: Tensor) -> list[str]:
    """Return a name for each example that no other example changes, beyond equal ones.

    A name is the BLAKE2b digest of the example's bytes and its target, and a count that tells equal
    examples apart: n equal ones have the counts 0 to n - 1. So the names of a data set without one
    of its examples are the names of the whole but one, whichever example it is.

    Args:
        examples: (N, ...), of any dtype. targets: (N, ...), of any dtype.
    """
    seen: Counter[str] = Counter()
    names = []
    shape = repr(tuple(examples.shape[1:])).encode()
    inputs = examples.detach().cpu().contiguous().numpy()
    wanted = targets.detach().cpu().contiguous().numpy()
    # A class by its number in digits: of images with labels names are what they have always been.
    number = targets.dtype == torch.int64 and targets.dim() == 1
    for one, target in zip(inputs, wanted, strict=True):
        digest = hashlib.blake2b(shape, digest_size=16)
        digest.update(b"%d" % target if number else target.tobytes())
        digest.update(b":")
        digest.update(one.tobytes())
        name = digest.hexdigest()
        names.append(f"{name}-{seen[name]}")
        seen[name] += 1
    return names
