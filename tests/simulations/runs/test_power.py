"""The power of the paired t-test: by integration, by simulation, and by scipy in another way."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from fedkn.seeds import numpy_generator
from simulations.runs.power import (
    MOST_SEEDS,
    detectable_difference,
    power,
    seeds_needed,
    spread_known_to,
)
from simulations.runs.statistics import compare_all_pairs, paired_p


@pytest.mark.parametrize(("n", "comparisons"), [(2, 1), (3, 20), (5, 1), (6, 78), (10, 21)])
def test_detectable_difference_has_the_power_it_claims(n: int, comparisons: int) -> None:
    alpha = 0.05 / comparisons
    delta = detectable_difference(0.02, n, alpha) / 0.02 * math.sqrt(n)
    critical = stats.t.ppf(1 - alpha / 2, n - 1)

    def found_given(variance: float) -> float:
        beyond = stats.norm.cdf(delta - critical * math.sqrt(variance / (n - 1)))
        return float(beyond * stats.chi2.pdf(variance, n - 1))

    power = sum(integrate.quad(found_given, *part, limit=200)[0] for part in ((0, 1), (1, 80)))
    assert power == pytest.approx(0.8, abs=1e-6)


def test_detectable_difference_by_simulation() -> None:
    n, deviation = 5, 0.03
    delta = detectable_difference(deviation, n)
    samples = numpy_generator(1, "power").normal(delta, deviation, size=(4000, n))
    found = np.mean([paired_p(sample.tolist()) < 0.05 for sample in samples])
    assert found == pytest.approx(0.8, abs=0.025)
    assert math.isnan(detectable_difference(0.0, 5))
    assert math.isnan(detectable_difference(0.03, 1))


def by_integration(difference: float, deviation: float, n: int, alpha: float) -> float:
    """The power without the noncentral t: over what the spread may be, a normal tail each."""
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    shift = difference / deviation * math.sqrt(n)

    def found_given(variance: float) -> float:
        beyond = stats.norm.sf(critical * math.sqrt(variance / (n - 1)) - shift)
        return float(beyond * stats.chi2.pdf(variance, n - 1))

    middle = float(n - 1)
    parts = ((0, middle), (middle, 4 * middle), (4 * middle, 40 * middle))
    return sum(integrate.quad(found_given, *part, limit=200)[0] for part in parts)


@pytest.mark.parametrize("pairs", [1, 10, 78, 1000])
@pytest.mark.parametrize("deviation", [0.004, 0.02, 0.06])
def test_the_seeds_needed_are_the_fewest(deviation: float, pairs: int) -> None:
    alpha = 0.05 / pairs
    seeds = seeds_needed(0.01, deviation, alpha)
    assert seeds == int(seeds) >= 3
    assert by_integration(0.01, deviation, int(seeds), alpha) >= 0.8
    if seeds > 3:
        assert by_integration(0.01, deviation, int(seeds) - 1, alpha) < 0.8
    assert power(0.01, deviation, int(seeds), alpha) == pytest.approx(
        by_integration(0.01, deviation, int(seeds), alpha), abs=1e-6
    )
    # And the other way round: what so many seeds detect is no more than what was asked for.
    assert detectable_difference(deviation, int(seeds), alpha) <= 0.01


def test_the_seeds_needed_by_simulation() -> None:
    difference, deviation, alpha = 0.01, 0.012, 0.05 / 3
    seeds = int(seeds_needed(difference, deviation, alpha))
    generator = numpy_generator(7, "seeds needed")

    def found(n: int) -> float:
        samples = generator.normal(difference, deviation, size=(4000, n))
        t, p = stats.ttest_1samp(samples, 0.0, axis=1)
        return float(np.mean((p < alpha) & (t > 0)))

    assert found(seeds) > 0.8 - 0.02
    assert found(seeds - 2) < 0.8


def test_what_cannot_be_said_of_seeds() -> None:
    assert seeds_needed(1e-6, 0.05) == math.inf
    assert power(1e-6, 0.05, MOST_SEEDS) < 0.8
    assert seeds_needed(10.0, 0.01) == 3
    for difference, deviation in ((0.01, 0.0), (0.01, math.nan), (0.0, 0.01), (math.nan, 0.01)):
        assert math.isnan(seeds_needed(difference, deviation))
    assert math.isnan(power(0.01, 0.0, 5))
    assert math.isnan(power(0.01, 0.02, 1))
    assert power(-0.01, 0.02, 9) == power(0.01, 0.02, 9)


def test_how_well_the_spread_is_known_by_simulation() -> None:
    n = 6
    low, high = spread_known_to(n)
    seen = numpy_generator(3, "spread").normal(0, 1, size=(8000, n)).std(axis=1, ddof=1)
    covered = np.mean((low * seen <= 1) & (high * seen >= 1))
    assert covered == pytest.approx(0.95, abs=0.01)
    assert all(math.isnan(end) for end in spread_known_to(1))


def test_a_comparison_knows_its_spread_and_its_level() -> None:
    kernel = {0: 0.90, 1: 0.92, 2: 0.95, 3: 0.91}
    group = {0: 0.88, 1: 0.93, 2: 0.91, 3: 0.90}
    none = {0: 0.80, 1: 0.86, 2: 0.81, 3: 0.79}
    found = compare_all_pairs({"here": {"kernel": kernel, "group": group, "none": none}})
    pair = next(c for c in found if c.has("kernel", "group"))
    differences = [kernel[seed] - group[seed] for seed in range(4)]
    assert pair.deviation == pytest.approx(np.std(differences, ddof=1))
    assert pair.level == pytest.approx(0.05 / 3)
    seeds = int(pair.seeds_for(0.01))
    assert by_integration(0.01, pair.deviation, seeds, pair.level) >= 0.8
    assert by_integration(0.01, pair.deviation, seeds - 1, pair.level) < 0.8
    # Two seeds make no test, and nothing is said of what it would find.
    few = compare_all_pairs({"here": {"a": {0: 0.5, 1: 0.6}, "b": {0: 0.4, 1: 0.45}}})
    assert math.isnan(few[0].detectable)
