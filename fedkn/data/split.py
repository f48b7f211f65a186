"""Setting aside a stratified part of the examples: for validation, for tests, on a client."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fedkn.errors import UserError
from fedkn.seeds import numpy_generator

__all__ = ["limited", "stratified_split"]


def stratified_split(
    labels: np.ndarray | Tensor, fraction: float, seed: int, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Split the examples into those kept and those held out, class by class.

    Of n >= 2 examples and a `fraction` above 0, exactly ``min(max(round(fraction * n), 1), n - 1)``
    are held out; of one example none, so that the kept part is never empty. Each class gives its
    share, rounded by the largest remainder (ties at random), and keeps at least one example as
    long as the number held out allows it.

    Parameters
    ----------
    labels
        Integer labels (N,).
    fraction
        Part to hold out, in [0, 1).
    seed, purpose
        The draw is a pure function of both and of the labels.

    Returns
    -------
    tuple of int64 arrays
        Sorted indices kept and sorted indices held out.

    Raises
    ------
    UserError
        `fraction` is outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UserError(f"the fraction held out for {purpose} must be in [0, 1), got {fraction}")
    labels = np.asarray(labels)
    count = len(labels)
    target = 0
    if fraction > 0 and count > 1:
        target = min(max(round(fraction * count), 1), count - 1)
    rng = numpy_generator(seed, "split", purpose)
    order = rng.permutation(count)
    members = [order[labels[order] == label] for label in np.unique(labels)]
    quotas = _quotas(np.array([len(own) for own in members], dtype=np.int64), target, rng)
    chosen = [own[:quota] for own, quota in zip(members, quotas, strict=True)]
    held = np.sort(np.concatenate([*chosen, np.empty(0, dtype=np.int64)]))
    return np.setdiff1d(np.arange(count), held), held


def limited(labels: np.ndarray | Tensor, limit: int, part: str) -> np.ndarray | None:
    """Return the sorted indices of `limit` examples, stratified; None where all are to be used.

    All are used if `limit` is 0 or not below their number. The draw depends on the labels and on
    `part` (``train`` or ``test``) alone.
    """
    if not limit or limit >= len(labels):
        return None
    return stratified_split(labels, limit / len(labels), 0, f"limit-{part}")[1]


def _quotas(sizes: np.ndarray, target: int, rng: np.random.Generator) -> np.ndarray:
    """Return how many each class gives, summing to `target`."""
    if not target:
        return np.zeros_like(sizes)
    share = sizes * (target / sizes.sum())
    quotas: np.ndarray = np.minimum(np.floor(share).astype(np.int64), sizes - 1)
    ties = rng.random(len(sizes))
    # The last example of a class is given only when every class is down to its last one.
    for limit in (sizes - 1, sizes):
        while (missing := target - int(quotas.sum())) > 0 and (quotas < limit).any():
            by_remainder = np.lexsort((ties, quotas - share))
            open_classes = [index for index in by_remainder if quotas[index] < limit[index]]
            quotas[open_classes[:missing]] += 1
    return quotas
