"""How units of few elements are normalized in evaluation, without a mask: averaged over drops.

In a large unit the variance under dropout hardly varies, and normalizing by its expected value is
what training did on average. A unit of nine pixels, often all equal, is another matter: now nothing
is dropped and its variance is zero, now one element is and it is not. So small units are
normalized by the expected moments given K, the number of dropped elements, and averaged over K:
Binomial(n, p). With f = K/n, m and v the unit's mean and biased variance, and kept
elements scaled by 1/(1-p), sampling without replacement gives

    E[mean' | K] = m (1 - f)/(1-p)
    E[var' | K] = (1 - f) ((1 - K/(n(n-1))) v + f m^2) / (1-p)^2

and s_K = 1/sqrt(E[var' | K] + eps). Over K, these average to the mean m and to the variance that
large units are normalized by, v + p/(1-p) E[x^2] (1 - 1/n). For units whose elements are equal the
average is exact. Which elements drop is not averaged over, so of a unit with one bright pixel the
true expectation, in which that pixel's loss leaves no variance, is much larger.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fedkn.layers.kernel.host_masks import LEVELS

__all__ = ["expected_scale_and_shift"]

# Numbers of dropped elements that are less probable than this are left out.
_NEGLIGIBLE = 1e-9


def expected_scale_and_shift(
    mean: Tensor, variance: Tensor, n: int, level: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return a and b such that a (U - mean) + b is the normalized unit U, averaged over K.

    Args:
        mean: of the unit without dropout, (N, 1, OH, OW).
        variance: biased, of the unit without dropout, like `mean`.
        n: elements of a unit.
        level: the drop probability in units of 1/LEVELS.
        eps: added to the variance.

    Both are like `mean`: a = sum_K P(K) s_K, and b = mean * (a - sum_K P(K) s_K (1-f)/(1-p)).
    """
    rows = torch.tensor(_counts(n, level), dtype=mean.dtype, device=mean.device)
    probability, of_mean, of_variance, of_square = rows.view(4, 1, -1, 1, 1)
    scales = torch.rsqrt(of_variance * variance + of_square * mean.square() + eps) * probability
    scale = scales.sum(1, keepdim=True)
    return scale, mean * (scales * (1.0 - of_mean)).sum(1, keepdim=True)


@functools.lru_cache
def _counts(n: int, level: int) -> tuple[tuple[float, ...], ...]:
    """Return P(K), E[mean' | K]/m and what v and m^2 are multiplied by in E[var' | K], by K."""
    p = level / LEVELS
    kept = 1.0 - p
    columns = []
    for dropped in range(n + 1):
        probability = math.comb(n, dropped) * p**dropped * kept ** (n - dropped)
        if probability < _NEGLIGIBLE:
            continue
        left = 1.0 - dropped / n
        one_less = 1.0 - dropped / (n * (n - 1)) if n > 1 else 1.0
        columns.append((
            probability,
            left / kept,
            left * one_less / kept**2,
            left * (1.0 - left) / kept**2,
        ))  # fmt: skip
    probabilities, *others = zip(*columns, strict=True)
    total = sum(probabilities)
    return (tuple(probability / total for probability in probabilities), *others)
