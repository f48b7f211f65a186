"""Epsilon from the distribution of the privacy loss of all steps, by Fourier transforms.

The loss of a step of the sampled Gaussian mechanism is log(p(z) / q(z)) with z drawn from p, where
{p, q} are N(0, sigma²) and its mixture with N(1, sigma²): one pair for each of the two neighbours
(Zhu, Dong and Wang, AISTATS 2022, arXiv 2106.08567). The loss of all steps is the sum of theirs,
and delta(epsilon) = E[max(0, 1 - exp(epsilon - loss))].

Losses are put on a grid so that delta only grows: the mass between two points goes to both, in the
shares that keep the probabilities under p and q ("connecting the dots", Doroshenko, Ghazi,
Kamath, Kumar and Manurangsi, PETS 2022, arXiv 2207.04380). What falls beyond the grid's upper
end, and what rounding may lose, counts as delta in full. So the result is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["loss_epsilon"]

Array = npt.NDArray[np.float64]


def loss_epsilon(runs: Sequence[tuple[float, float, int]], delta: float, known: float) -> float:
    """Return the epsilon at `delta` of `runs` of (noise multiplier, sample rate, steps).

    `known` is an upper bound that is returned where this finds no smaller one.
    """
    if not 0 < known <= _LARGEST:
        return known
    half = 2.0 ** math.ceil(math.log2(known))
    for _ in range(_WIDER):
        removed = _epsilon(runs, delta, half, removed=True)
        added = None if removed is None else _epsilon(runs, delta, half, removed=False)
        if removed is not None and added is not None:
            return min(known, max(removed, added))
        half *= 2
    return known


_POINTS = 1 << 16
_LARGEST = 100.0
_WIDER = 4
# Of delta, for what falls beyond the grid: more, and a wider grid is tried.
_BEYOND = 0.02
# Error of a coefficient of a transform of probabilities, and of their sum: many times what double
# precision has.
_COEFFICIENT = 5e-15
_ROUNDING = 4e-16


class _Step(NamedTuple):
    """A step's loss on the grid: its transform, its mass beyond the grid, log E[exp(l * loss)]."""

    transform: npt.NDArray[np.complex128]
    beyond: float
    log_moments: Array


def _epsilon(
    runs: Sequence[tuple[float, float, int]], delta: float, half: float, *, removed: bool
) -> float | None:
    """Return the epsilon of one of the neighbours on a grid of losses from -half to half.

    None if too much falls beyond the grid, or rounding could hide too much.
    """
    steps = [(_step(noise, rate, half, removed), count) for noise, rate, count in runs]
    beyond = sum(count * step.beyond for step, count in steps)
    # The sum of the losses wraps round at the grid's end: what does (Chernoff's bound) is lost.
    moments = np.sum([count * step.log_moments for step, count in steps], axis=0)
    beyond += math.exp(min(0.0, float(np.min(moments - _TILTS))))
    if beyond > _BEYOND * delta:
        return None
    whole = np.ones(_POINTS // 2 + 1, dtype=np.complex128)
    error = np.zeros(_POINTS // 2 + 1)
    for step, count in steps:
        whole *= step.transform**count
        error = error + count * _COEFFICIENT / np.maximum(np.abs(step.transform), 1e-300)
    lost = 2 * float(np.sum(np.minimum(np.abs(whole) * error, 1.0))) + _COEFFICIENT * _POINTS**0.5
    mass = np.maximum(np.fft.irfft(whole, _POINTS)[: _POINTS // 2], 0.0)
    loss = np.arange(_POINTS // 2) * (2 * half / _POINTS)
    above = np.cumsum(mass[::-1])[::-1]
    discounted = np.cumsum((mass * np.exp(-loss))[::-1])[::-1]
    deltas = above - np.exp(loss) * discounted + beyond + lost
    (enough,) = np.nonzero(deltas * (1 + 1e-9) <= delta)
    return float(loss[enough[0]]) if len(enough) else None


# Exponents of Chernoff's bound, times the grid's half.
_TILTS: Array = np.exp2(np.arange(16, dtype=np.float64))


@lru_cache(maxsize=32)
def _step(noise: float, rate: float, half: float, removed: bool) -> _Step:
    """Return the loss of a step whose example is `removed` from q's side, or added to it."""
    spacing = 2 * half / _POINTS
    loss: Array = np.arange(-_POINTS // 2, _POINTS // 2, dtype=np.float64) * spacing
    z = _where(loss if removed else -loss, noise, rate)
    plain = _between(z, 0.0, noise)
    mixed = (1 - rate) * plain + rate * _between(z, 1.0, noise)
    p, q = (mixed, plain) if removed else (plain[::-1], mixed[::-1])
    # From below the lowest point, between two points, and from above the highest.
    inner_p, inner_q = p[1:-1], q[1:-1]
    share = -np.expm1(-spacing)
    error = _ROUNDING * (1 + np.exp(np.minimum(loss[:-1], 0.0)))
    upper = (inner_p - np.exp(loss[:-1]) * inner_q + error) / share
    upper = np.clip(upper, 0.0, inner_p)
    mass = np.zeros(_POINTS)
    mass[0] = p[0]
    mass[:-1] += inner_p - upper
    mass[1:] += upper
    tilted = _TILTS[:, None] / half * loss[None, :]
    largest = tilted[:, -1:]
    with np.errstate(divide="ignore"):
        moments = np.log(np.exp(tilted - largest) @ mass) + largest[:, 0]
    # Loss 0 at place 0, as transforms have it.
    return _Step(np.fft.rfft(np.fft.ifftshift(mass)), float(p[-1]), moments)


def _where(loss: Array, noise: float, rate: float) -> Array:
    """Return the z at which log(1 - rate + rate * exp((2z - 1) / (2 noise²))) is `loss`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        z = noise**2 * np.log1p(np.expm1(loss) / rate) + 0.5
    return np.where(np.expm1(loss) > -rate, z, -np.inf)


def _between(z: Array, mean: float, deviation: float) -> Array:
    """Return the mass of N(mean, deviation²) below, between and above the points `z`."""
    points = np.sort(z)
    u = (points - mean) / (deviation * math.sqrt(2))
    above = torch.special.erfc(torch.from_numpy(u)).numpy() / 2
    below = torch.special.erfc(torch.from_numpy(-u)).numpy() / 2
    # From the side on which the tails are small, so that they keep their digits.
    between = np.where(u[:-1] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
    return np.concatenate([below[:1], between, above[-1:]])
