"""What a paired t-test over so many seeds would find, and how many seeds it takes to find more.

All by the noncentral t distribution: of n paired differences with a mean d and a standard
deviation s, t has n - 1 degrees of freedom and the noncentrality d / s * sqrt(n). A difference
counts as found where the test says that it is not zero, on the side where it lies. The level is
that of one test: a family of m tests under Holm's correction may ask 0.05 / m of it, and never
less.
"""

from __future__ import annotations

import math

from scipy import optimize, stats

__all__ = [
    "ALPHA",
    "FEWEST_SEEDS",
    "MOST_SEEDS",
    "POWER",
    "detectable_difference",
    "power",
    "seeds_needed",
    "spread_known_to",
]

ALPHA = 0.05
POWER = 0.8
# With two, the spread would be judged by a single number.
FEWEST_SEEDS = 3
MOST_SEEDS = 1000
"""As many as a comparison may have: nobody is told to run more."""


def power(difference: float, deviation: float, n: int, alpha: float = ALPHA) -> float:
    """Return the probability that a paired t-test of `n` pairs finds a true difference.

    `deviation` is the standard deviation of the paired differences, in the unit of `difference`;
    `alpha` the two-sided level. NaN below two pairs, and without any spread.
    """
    if n < 2 or not deviation > 0:
        return math.nan
    return _found(abs(difference) / deviation * math.sqrt(n), n, alpha)


def detectable_difference(deviation: float, n: int, alpha: float = ALPHA) -> float:
    """Return the true difference that a paired t-test finds with a probability of 80%.

    Arguments as of `power`. NaN below two pairs, and without any spread.
    """
    if n < 2 or not deviation > 0:
        return math.nan
    critical = _critical(n, alpha)
    # The power is far above 80% at ten times the critical value, for one degree of freedom too.
    noncentrality = optimize.brentq(
        lambda value: _found(value, n, alpha) - POWER, 0.0, 10 * critical + 10
    )
    return float(noncentrality) * deviation / math.sqrt(n)


def seeds_needed(difference: float, deviation: float, alpha: float = ALPHA) -> float:
    """Return the fewest seeds, `FEWEST_SEEDS` or more, that find a true difference 4 times in 5.

    Arguments as of `power`. Infinite where it takes more than `MOST_SEEDS`; NaN without any spread,
    and for no difference at all.
    """
    if not deviation > 0 or not abs(difference) > 0:
        return math.nan
    if power(difference, deviation, MOST_SEEDS, alpha) < POWER:
        return math.inf
    too_few, enough = FEWEST_SEEDS - 1, MOST_SEEDS
    # More seeds find more, so halving finds the fewest.
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if power(difference, deviation, middle, alpha) < POWER:
            too_few = middle
        else:
            enough = middle
    return float(enough)


def spread_known_to(n: int) -> tuple[float, float]:
    """Return between which multiples of the spread seen over `n` seeds the true one lies.

    The 95% interval of the standard deviation of normal values, by the chi-squared distribution;
    NaN below two seeds.
    """
    if n < 2:
        return math.nan, math.nan
    low, high = (float(stats.chi2.ppf(of, n - 1)) for of in (1 - ALPHA / 2, ALPHA / 2))
    return math.sqrt((n - 1) / low), math.sqrt((n - 1) / high)


def _critical(n: int, alpha: float) -> float:
    return float(stats.t.ppf(1 - alpha / 2, n - 1))


def _found(noncentrality: float, n: int, alpha: float) -> float:
    return float(stats.nct.sf(_critical(n, alpha), n - 1, noncentrality))
