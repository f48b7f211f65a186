"""What steps of the sampled Gaussian mechanism cost: upper bounds of epsilon at a given delta.

A step takes each example with probability q, independently, sums vectors of norm at most 1, and
adds Gaussian noise of deviation sigma. Three bounds are computed, each of which holds for every
history of such steps, and the smallest is the figure:

- Rényi differential privacy (Mironov, Talwar and Zhang, 2019, arXiv 1908.10530), added up over the
  steps and converted (Balle et al., AISTATS 2020, arXiv 1905.09982, theorem 21), at orders from
  1.01 to a million. Orders that end early, as those of Opacus do at 63, have a floor: 0.103 at
  delta 1e-5.
- The steps as if every example were in each of them, which bounds them because leaving examples out
  at random never costs privacy. They are then one Gaussian mechanism of 1/sigma² = sum of all
  1/sigma², whose epsilon is known exactly (Balle and Wang, ICML 2018, arXiv 1805.06530, theorem 8).
- The distribution of their privacy loss (`fedkn.training.privacy_loss`), nearly exact, where it can
  be computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedkn.training.privacy_loss import loss_epsilon

__all__ = ["ORDERS", "Run", "epsilon", "gaussian_epsilon", "renyi_of_a_step"]

Array = npt.NDArray[np.float64]
Run = tuple[float, float, int]
"""Noise multiplier sigma, sample rate q, number of steps."""

ORDERS: Array = np.concatenate(
    [
        1 + np.arange(1, 10) / 100,
        1 + np.arange(1, 100) / 10,
        np.arange(11.0, 64.0),
        64.0 * 1.05 ** np.arange(199),
    ]
)
"""The orders of Rényi differential privacy that are tried, ascending."""


def epsilon(history: Iterable[Run], delta: float) -> float:
    """Return an upper bound of the epsilon of all steps of `history` together, at `delta`.

    0 where there are none, infinite where one had no noise.
    """
    runs = tuple(sorted((noise, rate, steps) for noise, rate, steps in history if steps and rate))
    if not runs:
        return 0.0
    if any(noise == 0 for noise, _, _ in runs):
        return math.inf
    return _epsilon(runs, delta)


# Clients of equal size share it, and a report asks again.
@lru_cache(maxsize=1024)
def _epsilon(runs: tuple[Run, ...], delta: float) -> float:
    spent = sum(steps * renyi_of_a_step(noise, rate) for noise, rate, steps in runs)
    shift = np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    signal = math.sqrt(math.fsum(steps / noise**2 for noise, _, steps in runs))
    bound = max(min(float(np.min(spent + shift)), gaussian_epsilon(signal, delta)), 0.0)
    if all(rate >= 1 for _, rate, _ in runs):
        return bound
    return loss_epsilon(runs, delta, bound)


# Clients of equal size share it, and every round asks again.
@lru_cache(maxsize=1024)
def renyi_of_a_step(noise_multiplier: float, sample_rate: float) -> Array:
    """Return the Rényi divergence that a step costs at each of `ORDERS`; infinite: not computed.

    For order a it is log(E[(1 - q + q exp((2z - 1) / (2 sigma²)))^a]) / (a - 1) with z normal of
    deviation sigma (arXiv 1908.10530, theorem 4), integrated by the trapezoidal rule: the integrand
    is analytic in a strip and falls like a Gaussian, so the error falls exponentially with the
    spacing. Where that takes too many points, the Gaussian mechanism's a / (2 sigma²) bounds it.
    """
    whole = ORDERS / (2 * noise_multiplier**2)
    spacing = min(noise_multiplier, noise_multiplier**2) / 4
    if sample_rate >= 1 or noise_multiplier < _LITTLE_NOISE:
        return whole
    found = whole.copy()
    for place, order in enumerate(ORDERS):
        if order / spacing > _MOST_POINTS:
            break
        moment = _log_moment(float(order), noise_multiplier, sample_rate, spacing)
        found[place] = min(whole[place], moment / (order - 1))
    return found


def gaussian_epsilon(signal: float, delta: float) -> float:
    """Return the epsilon at `delta` of noise of deviation 1 on a sum that moves by `signal`.

    Exact to 1e-9 and rounded upwards; infinite where double precision cannot tell.
    """

    def holds(candidate: float) -> bool:
        upper = _normal_tail(candidate / signal - signal / 2)
        # Both tails are rounded: what may be lost counts as if it were.
        lower = math.exp(candidate) * _normal_tail(candidate / signal + signal / 2)
        return upper * (1 + _ROUNDING) - lower * (1 - _ROUNDING) <= delta

    if holds(0.0):
        return 0.0
    high = 1e-6
    while not holds(high):
        high *= 2
        if high > _LARGEST_EXPONENT:
            return math.inf
    low = high / 2 if high > 1e-6 else 0.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


_LITTLE_NOISE = 0.05
_MOST_POINTS = 100_000
_REACH = 12.0
_ROUNDING = 1e-13
_LARGEST_EXPONENT = 600.0


def _log_moment(order: float, noise: float, rate: float, spacing: float) -> float:
    """Return log E[(1 - q + q exp((2z - 1) / (2 sigma²)))^order], rounded upwards."""
    # The integrand's mass lies about the points from 0 to `order`.
    z = np.arange(-_REACH * noise, order + _REACH * noise + spacing, spacing)
    weight = np.log(spacing / (noise * math.sqrt(2 * math.pi))) - z**2 / (2 * noise**2)
    exponent = (2 * z - 1) / (2 * noise**2)
    power = order * np.logaddexp(math.log1p(-rate), math.log(rate) + exponent)
    largest = float(np.max(weight + power))
    if largest < 0 and float(np.max(power)) < _LARGEST_EXPONENT:
        # About 1, where the logarithm of the sum would lose all digits of what exceeds it.
        power = order * np.log1p(rate * np.expm1(exponent))
        excess = float(np.sum(np.exp(weight) * np.expm1(power)))
        return math.log1p(max(excess, 0.0)) * (1 + _ROUNDING)
    total = float(np.sum(np.exp(weight + power - largest)))
    return max((largest + math.log(total)) * (1 + _ROUNDING), 0.0)


def _normal_tail(x: float) -> float:
    return math.erfc(x / math.sqrt(2)) / 2
