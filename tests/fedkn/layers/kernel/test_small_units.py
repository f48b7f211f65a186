"""The expectation over dropout in small units, against every mask there is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.layers import KernelNorm2d, KNConv2d
from fedkn.layers.kernel.dropout import LEVELS, drop_level
from fedkn.layers.kernel.settings import SMALL_UNIT
from fedkn.layers.kernel.small_units import expected_scale_and_shift

EPS = 1e-5


def by_every_mask(unit: torch.Tensor, p: float) -> tuple[float, float]:
    """Return E[s_K] and E[mean'_K s_K], the moments given K averaged over all masks of K drops."""
    n = len(unit)
    groups: dict[int, list[tuple[float, float]]] = {}
    for mask in itertools.product((0.0, 1.0), repeat=n):
        dropped = unit * torch.tensor(mask, dtype=torch.float64) / (1 - p)
        moments = (dropped.mean().item(), dropped.var(correction=0).item())
        groups.setdefault(n - int(sum(mask)), []).append(moments)
    scale = centre = 0.0
    for drops, found in groups.items():
        probability = math.comb(n, drops) * p**drops * (1 - p) ** (n - drops)
        mean = sum(m for m, _ in found) / len(found)
        s = (sum(v for _, v in found) / len(found) + EPS) ** -0.5
        scale += probability * s
        centre += probability * mean * s
    return scale, centre


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(-3, 3), min_size=1, max_size=8),
    p=st.sampled_from([0.05, 0.25, 0.5]),
)
def test_scale_and_shift_are_those_of_every_mask(values, p) -> None:
    unit = torch.tensor(values, dtype=torch.float64)
    level = drop_level(p)
    mean, variance = (m.view(1, 1, 1, 1) for m in (unit.mean(), unit.var(correction=0)))
    scale, shift = expected_scale_and_shift(mean, variance, len(values), level, EPS)
    wanted_scale, wanted_centre = by_every_mask(unit, level / LEVELS)
    # a (U - m) + b is E[s] U - E[mean' s].
    centre = mean * scale - shift
    assert scale.item() == pytest.approx(wanted_scale, rel=1e-5)
    assert centre.item() == pytest.approx(wanted_centre, rel=1e-5, abs=1e-5 * wanted_scale)


def test_a_constant_unit_is_on_average_what_training_makes_of_it() -> None:
    # Nine equal pixels: in training nothing is dropped in (1-p)^9 of the cases, and then eps alone
    # is the variance. The expected variance of the unit would give zero here.
    torch.manual_seed(0)
    layer = KNConv2d(1, 1, 3, dropout_p=0.1)
    torch.nn.init.constant_(layer.weight, 1.0)
    x = torch.full((1, 1, 3, 3), 0.4)
    draws = torch.stack([layer(x) for _ in range(4000)])
    error = draws.std().item() / len(draws) ** 0.5
    assert abs(layer.eval()(x).item() - draws.mean().item()) < 5 * error
    assert abs(draws.mean().item()) > 20 * error


@pytest.mark.parametrize("channels", [SMALL_UNIT, SMALL_UNIT + 1])
def test_small_and_large_units_meet(channels) -> None:
    # At the border the two ways must differ little, for units as a network has them.
    torch.manual_seed(0)
    x = torch.randn(2, channels, 3, 3).relu()
    layer = KernelNorm2d(1, dropout_p=0.1).eval()
    p = drop_level(0.1) / LEVELS
    mean = x.mean(1, keepdim=True)
    square = x.square().mean(1, keepdim=True)
    variance = x.var(1, correction=0, keepdim=True) + p / (1 - p) * square * (1 - 1 / channels)
    large = (x - mean) / torch.sqrt(variance + EPS)
    assert ((layer(x) - large).norm() / large.norm()).item() < 0.01
