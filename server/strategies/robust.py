"""Aggregations that ask what most updates agree on, of the updates where they lie.

Krum, the coordinate-wise median, the trimmed mean and Bulyan: the arithmetic of Flower's classes of
these names (`flwr.serverapp.strategy`, 1.41) on rows of a `Stack`, on its device. What is fetched
is the aggregate and, for Krum, who is how far from whom. Sums and distances are float64, where
Flower's are of the updates' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedkn.stack import rows_of
from server.strategies.base import Arrays

__all__ = ["bulyan_mean", "median", "nearest", "trimmed_mean"]

# What is sorted at once, of all clients: in it the working memory is the same for any model.
_NUMBERS_AT_ONCE = 1 << 20


def nearest(
    states: Sequence[Arrays], names: Iterable[str], malicious: int, select: int
) -> list[int]:
    """Return the places of the `select` states that lie nearest to the others, the nearest first.

    Krum's score is the sum of the squared distances to the n - f - 2 nearest others, at least one
    (arXiv 1703.02757, Section 4); of equal scores the first place comes first.

    Args:
        names: the tensors over which distances are taken, all together.
        malicious: f.
    """
    apart = _squared_distances(states, names)
    closest = max(1, len(states) - malicious - 2)
    # The nearest of all is the state itself.
    scores = np.sort(apart, axis=1)[:, 1 : closest + 1].sum(axis=1)
    chosen: list[int] = np.argsort(scores, kind="stable")[:select].tolist()
    return chosen


def median(states: Sequence[Arrays], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the median of each number, in float64; of the middle two their mean."""
    return _each(states, names, _median)


def trimmed_mean(
    states: Sequence[Arrays], names: Iterable[str], part: float
) -> dict[str, np.ndarray]:
    """Return the mean of each number without its least and greatest values, in float64.

    Of n values int(`part` n) are left out at either end; `part` is below a half.
    """
    cut = int(part * len(states))

    def kept(ascending: Tensor) -> Tensor:
        return _mean(ascending[cut : len(ascending) - cut])

    return _each(states, names, kept)


def bulyan_mean(states: Sequence[Arrays], names: Iterable[str], keep: int) -> dict[str, np.ndarray]:
    """Return the mean of those `keep` values of each number that are nearest to its median.

    In float64 (arXiv 1802.07927, Section 4). Of values equally near the lesser is kept.
    """

    def kept(ascending: Tensor) -> Tensor:
        # They are neighbours: the least falls out while the next above the greatest is nearer.
        above = ascending.double() - _median(ascending)
        first = (-above[: len(ascending) - keep] > above[keep:]).sum(dim=0)
        places = first + torch.arange(keep, device=first.device).unsqueeze(1)
        return _mean(ascending.gather(0, places))

    return _each(states, names, kept)


def _each(
    states: Sequence[Arrays], names: Iterable[str], combine: Callable[[Tensor], Tensor]
) -> dict[str, np.ndarray]:
    """Return what `combine` makes, float64 (n,), of the ascending values (clients, n)."""
    found: dict[str, np.ndarray] = {}
    for layout, run, rows in rows_of(states, names):
        made = [combine(_ascending(values)) for values in _blocks(rows)]
        found |= layout.named(run, torch.cat(made).cpu().numpy())
    return found


def _squared_distances(states: Sequence[Arrays], names: Iterable[str]) -> np.ndarray:
    """Return the squared Euclidean distances of the states from each other, float64 (n, n)."""
    products: Tensor | None = None
    for _, _, rows in rows_of(states, names):
        for block in _blocks(rows):
            values = block.double()
            found = values @ values.T
            products = found if products is None else products.add_(found)
    if products is None:
        return np.zeros((len(states), len(states)))
    squares = products.diagonal()
    apart = squares.unsqueeze(0) + squares.unsqueeze(1) - (products + products.T)
    distances: np.ndarray = apart.cpu().numpy()
    return distances


def _blocks(rows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield copies of the `rows` (n,), some columns at a time: (clients, columns)."""
    width = max(1, _NUMBERS_AT_ONCE // len(rows))
    for begin in range(0, max(1, len(rows[0])), width):
        yield torch.stack([row[begin : begin + width] for row in rows])


def _ascending(values: Tensor) -> Tensor:
    """Return each column of `values` sorted, which may be changed in place."""
    if values.device.type == "cpu":
        # PyTorch's own takes ten times as long there.
        values.numpy().sort(axis=0)
        return values
    return values.sort(dim=0).values


def _median(ascending: Tensor) -> Tensor:
    middle, odd = divmod(len(ascending), 2)
    return _mean(ascending[middle - 1 + odd : middle + 1])


def _mean(values: Tensor) -> Tensor:
    """Return the mean of each column, float64: row by row, which gives one result everywhere."""
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for row in values:
        total.add_(row)
    return total.div_(len(values))
