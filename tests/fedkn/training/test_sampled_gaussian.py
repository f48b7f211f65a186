"""Upper bounds of epsilon: against closed forms, Opacus' accountants and sums of integer orders."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import norm

from fedkn.training.privacy_loss import _epsilon, loss_epsilon
from fedkn.training.sampled_gaussian import ORDERS, epsilon, gaussian_epsilon, renyi_of_a_step

DELTA = 1e-5
STEPS = [
    (1.0, 0.08, 130),
    (1.0, 0.016, 63),
    (2.0, 0.016, 630),
    (0.6, 0.3, 20),
    (10.0, 0.01, 10),
    (30.0, 0.05, 10),
    (100.0, 0.1, 5),
    (5.0, 0.001, 1000),
]


def closed_form(order: int, noise: float, rate: float) -> float:
    """Return the divergence at an integer order (arXiv 1908.10530, sec. 3.3), less one exactly."""
    q = Fraction(rate)
    total = 0.0
    for k in range(2, order + 1):
        weight = math.comb(order, k) * (1 - q) ** (order - k) * q**k
        total += float(weight) * math.expm1((k * k - k) / (2 * noise**2))
    return math.log1p(total) / (order - 1)


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("rate", [1e-5, 0.01, 0.3, 0.999])
def test_integer_orders_have_a_closed_form(noise, rate):
    found = renyi_of_a_step(noise, rate)
    for order in (2, 3, 11, 30):
        (place,) = np.flatnonzero(np.isclose(ORDERS, order, rtol=1e-12))
        if order**2 / (2 * noise**2) < 700:  # or a float overflows
            # The divergence is a sum of 2 terms about 1: below 1e-13 nothing of it can be told.
            expected = closed_form(order, noise, rate)
            assert found[place] == pytest.approx(expected, rel=1e-7, abs=1e-14)


@pytest.mark.parametrize(("noise", "rate"), [(0.5, 0.3), (1.0, 0.08), (2.0, 0.01), (4.0, 0.5)])
def test_the_other_orders_are_those_of_opacus(noise, rate):
    rdp = pytest.importorskip("opacus.accountants.analysis.rdp")
    some = ORDERS <= 63
    theirs = rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=ORDERS[some].tolist())
    np.testing.assert_allclose(renyi_of_a_step(noise, rate)[some], theirs, rtol=1e-6)


def test_divergences_do_not_fall_with_the_order_nor_exceed_the_whole_mechanism():
    for noise in (0.04, 0.3, 1.0, 20.0):
        for rate in (1e-4, 0.1, 0.7, 1.0):
            found = renyi_of_a_step(noise, rate)
            assert (np.diff(found) >= -1e-12 * found[1:]).all()
            assert (found <= ORDERS / (2 * noise**2) * (1 + 1e-12)).all()


@pytest.mark.parametrize("run", STEPS, ids=str)
def test_epsilon_is_the_truth_and_less_than_opacus_rdp(run):
    """Opacus' PRV accountant is exact within an error that it is told."""
    accountants = pytest.importorskip("opacus.accountants")
    coarse, exact = accountants.RDPAccountant(), accountants.PRVAccountant()
    coarse.history = exact.history = [run]
    ours = epsilon([run], DELTA)
    error = max(ours / 100, 3e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        assert ours < coarse.get_epsilon(delta=DELTA)
        most = exact.get_epsilon(delta=DELTA, eps_error=error)
    assert most - 2 * error <= ours <= most


def delta_of_a_step(noise: float, rate: float, e: float, *, removed: bool) -> float:
    """Return P(A) - exp(e) Q(A), A where P exceeds exp(e) Q: of N(0, noise²) and the mixture."""

    def mixture(tail, z: float) -> float:
        return (1 - rate) * tail(z / noise) + rate * tail((z - 1) / noise)

    excess = math.exp(e if removed else -e) - (1 - rate)
    if excess <= 0:  # nowhere does N(0, noise²) exceed so much
        return 0.0
    z = noise**2 * math.log(excess / rate) + 0.5
    if removed:
        return mixture(norm.sf, z) - math.exp(e) * norm.sf(z / noise)
    return norm.cdf(z / noise) - math.exp(e) * mixture(norm.cdf, z)


@pytest.mark.parametrize(("noise", "rate"), [(0.5, 0.3), (1.0, 0.08), (4.0, 0.5), (20.0, 0.01)])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_a_single_step_has_a_closed_form(noise, rate, delta):
    found = epsilon([(noise, rate, 1)], delta)
    at = [
        max(delta_of_a_step(noise, rate, e, removed=removed) for removed in (True, False))
        for e in (found or 1e-9, 0.998 * found)
    ]
    assert at[0] <= delta * (1 + 1e-6)
    assert not found or at[1] > delta


@pytest.mark.parametrize(("noise", "rate"), [(0.5, 0.3), (1.0, 0.2), (4.0, 0.5)])
def test_each_neighbour_has_its_own_loss(noise, rate):
    """The smaller of the two would be hidden by the larger."""
    for removed in (True, False):
        found = _epsilon([(noise, rate, 1)], 1e-6, 16.0, removed=removed)
        assert delta_of_a_step(noise, rate, found, removed=removed) <= 1e-6 * (1 + 1e-6)
        assert delta_of_a_step(noise, rate, found - 2e-3, removed=removed) > 1e-6


def test_the_loss_of_full_batches_is_that_of_one_gaussian_mechanism():
    for noise, steps in ((3.0, 12), (50.0, 1), (10.0, 1000)):
        exact = gaussian_epsilon(math.sqrt(steps) / noise, DELTA)
        found = loss_epsilon([(noise, 1.0, steps)], DELTA, 1.5 * exact)
        assert exact * (1 - 1e-9) <= found <= exact * 1.001


def test_two_kinds_of_steps_are_summed_as_they_would_be_step_by_step():
    """By convolutions on a grid of their own, of the one neighbour that decides."""
    kinds = [(1.0, 0.1, 2), (2.0, 0.3, 1)]
    spacing, reach = 1e-3, 12.0
    z = np.arange(-40.0, 41.0, 2e-4)
    points = np.arange(-reach, reach, spacing)
    total = None
    for noise, rate, steps in kinds:
        loss = np.log1p(rate * np.expm1((2 * z - 1) / (2 * noise**2)))
        density = (1 - rate) * norm.pdf(z, 0, noise) + rate * norm.pdf(z, 1, noise)
        mass, _ = np.histogram(loss, [*points, reach], weights=density * 2e-4)
        for _ in range(steps):
            total = mass if total is None else np.convolve(total, mass)
    sums = np.arange(len(total)) * spacing - 3 * reach + 1.5 * spacing
    found = epsilon(kinds, DELTA)
    at = [total[sums > e] @ -np.expm1(e - sums[sums > e]) for e in (found, found * 0.98)]
    assert at[0] < DELTA * 1.01 < at[1]


def test_low_losses_are_not_overstated():
    """Opacus' orders end at 63, which makes these 0.103."""
    exact = gaussian_epsilon(1 / 800, DELTA)
    assert exact == pytest.approx(0.00253, rel=0.01)
    assert epsilon([(800.0, 1.0, 1)], DELTA) == exact
    assert epsilon([(800.0, 0.5, 1)], DELTA) <= exact
    assert 0.0007 < epsilon([(20.0, 0.001, 100)], DELTA) < 0.0009
    assert 0.0011 < epsilon([(5.0, 0.001, 10)], DELTA) < 0.0013


@pytest.mark.parametrize("signal", [1e-4, 0.01, 0.3, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_the_gaussian_mechanism_is_exact(signal, delta):
    """Delta at the epsilon found, by SciPy, in the two terms of Balle and Wang."""
    found = gaussian_epsilon(signal, delta)

    def delta_at(e: float) -> float:
        lower = math.exp(e + norm.logcdf(-signal / 2 - e / signal))
        return norm.cdf(signal / 2 - e / signal) - lower

    if not found:
        assert delta_at(0.0) <= delta
        return
    assert delta_at(found) <= delta * (1 + 1e-9)
    assert delta_at(found * (1 - 1e-3)) > delta


def test_full_batches_are_one_gaussian_mechanism():
    history = [(3.0, 1.0, 12), (5.0, 1.0, 7)]
    signal = math.sqrt(12 / 9 + 7 / 25)
    assert epsilon(history, DELTA) == gaussian_epsilon(signal, DELTA)


def test_what_double_precision_cannot_tell_is_bounded_by_the_other():
    assert gaussian_epsilon(100.0, DELTA) == math.inf
    assert 5000 < epsilon([(0.01, 1.0, 1)], DELTA) < 6000
    assert epsilon([(0.01, 0.5, 10)], DELTA) < math.inf
    # Each tail is right to its last digits, however small: 1e-30 is no limit.
    found = gaussian_epsilon(1.0, 1e-30)
    assert norm.logcdf(0.5 - found) > math.log(1e-30)
    assert norm.logcdf(0.5 - found) < math.log(1e-28)


def test_more_steps_less_noise_and_larger_batches_cost_more():
    base = epsilon([(1.0, 0.1, 10)], DELTA)
    assert epsilon([(1.0, 0.1, 11)], DELTA) > base
    assert epsilon([(0.9, 0.1, 10)], DELTA) > base
    assert epsilon([(1.0, 0.11, 10)], DELTA) > base
    assert epsilon([(1.0, 0.1, 10)], DELTA / 10) > base
    assert epsilon([(1.0, 0.1, 5), (1.0, 0.1, 5)], DELTA) == pytest.approx(base, rel=1e-4)


def test_nothing_and_no_noise():
    assert epsilon([], DELTA) == 0.0
    assert epsilon([(1.0, 0.5, 0), (0.0, 0.0, 3)], DELTA) == 0.0
    assert epsilon([(1.0, 0.5, 1), (0.0, 0.5, 1)], DELTA) == math.inf
