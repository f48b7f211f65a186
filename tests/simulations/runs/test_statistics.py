"""Statistics against closed forms, brute force and other routes to the same number."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from fedkn.seeds import numpy_generator
from simulations.runs.statistics import (
    compare_all_pairs,
    holm,
    mean_interval,
    paired_p,
    rounds_to_target,
    smallest_exact_p,
    summarize_rounds,
)


def test_interval_against_printed_tables() -> None:
    # t(0.975) for 4 degrees of freedom is 2.776 in any table; the deviation of 1..5 is sqrt(2.5).
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3.0
    assert interval.half_width == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert math.isnan(mean_interval([0.5]).half_width)
    assert mean_interval([0.5]).mean == 0.5
    assert mean_interval([]).n == 0


def test_interval_covers_the_truth_95_times_in_100() -> None:
    generator = numpy_generator(0, "coverage")
    covered = 0
    for values in generator.normal(0.9, 0.02, size=(4000, 4)):
        interval = mean_interval(values.tolist())
        covered += abs(interval.mean - 0.9) <= interval.half_width
    assert covered / 4000 == pytest.approx(0.95, abs=0.012)


def test_rounds_to_target() -> None:
    assert rounds_to_target({0: 0.1, 2: 0.8, 1: 0.7, 3: 0.6}, 0.8) == 2
    assert rounds_to_target({0: 0.1, 1: math.nan}, 0.8) is None
    assert rounds_to_target({}, 0.0) is None


def test_unreached_targets_are_counted_as_late_not_left_out() -> None:
    assert summarize_rounds([3, 5, None]).median == 5
    assert summarize_rounds([3, None, None]).median == math.inf
    assert summarize_rounds([3, None]).median == math.inf
    assert summarize_rounds([3, 4]).median == 3.5
    summary = summarize_rounds([None, 9])
    assert (summary.reached, summary.total) == (1, 2)
    assert math.isnan(summarize_rounds([]).median)


@given(st.lists(st.integers(-1000, 1000), min_size=3, max_size=8))
@settings(deadline=None, max_examples=100)
def test_paired_p_is_the_published_test(points: list[int]) -> None:
    differences = [point / 1000 for point in points]
    if len(set(points)) == 1:
        expected = 1.0 if points[0] == 0 else 2 * 0.5 ** len(points)
    else:
        expected = stats.ttest_1samp(differences, 0.0).pvalue
    assert paired_p(differences) == pytest.approx(expected, rel=1e-9)


def test_paired_p_by_integrating_students_density() -> None:
    differences = [0.031, 0.012, 0.025, 0.044]
    t = np.mean(differences) / (np.std(differences, ddof=1) / 2)

    def density(x: float) -> float:  # 3 degrees of freedom
        return 2 / (math.pi * math.sqrt(3) * (1 + x * x / 3) ** 2)

    assert paired_p(differences) == pytest.approx(2 * integrate.quad(density, t, math.inf)[0])


def test_equal_differences_up_to_rounding_have_no_spread() -> None:
    differences = [0.9 - 0.8, 0.8 - 0.7, 0.7 - 0.6]
    assert len(set(differences)) > 1
    assert paired_p(differences) == 0.25
    assert math.isnan(paired_p([0.1, 0.2]))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_smallest_exact_p_by_brute_force(n: int) -> None:
    differences = np.arange(1, n + 1) / 7
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=n)]
    extreme = sum(total >= differences.sum() - 1e-12 for total in sums)
    assert smallest_exact_p(n) == extreme / len(sums)


def test_holm_on_a_worked_example() -> None:
    # By hand: 0.01 x 4, 0.02 x 3, 0.022 x 2 = 0.044 (raised to 0.06), 0.09 x 1.
    assert holm([0.02, 0.01, 0.022, 0.09]) == pytest.approx([0.06, 0.04, 0.06, 0.09])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_leaves_untested_pairs_out_of_the_count() -> None:
    corrected = holm([0.01, math.nan, 0.03])
    assert corrected[0] == 0.02
    assert math.isnan(corrected[1])
    assert corrected[2] == 0.03


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(deadline=None, max_examples=100)
def test_holm_rejects_what_the_stepwise_definition_rejects(p_values: list[float]) -> None:
    alpha = 0.05
    rejected = set()
    for step, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] * (len(p_values) - step) >= alpha:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p < alpha} == rejected


def test_comparisons_pair_by_seed_and_are_corrected_together() -> None:
    kernel, group = {0: 0.9, 1: 0.92, 2: 0.95, 3: 0.5}, {2: 0.8, 0: 0.85, 1: 0.84, 9: 0.1}
    groups = {
        ("iid", 2): {"group": group, "kernel": kernel, "none": {0: 0.3}},
        ("iid", 4): {
            "group": {0: 0.8, 1: 0.7, 2: 0.75},
            "kernel": {0: 0.8, 1: 0.71, 2: 0.75},
        },
    }
    comparisons = {(c.group, c.first, c.second): c for c in compare_all_pairs(groups)}
    assert len(comparisons) == 4
    ahead = comparisons[("iid", 2), "kernel", "group"]
    assert ahead.n == 3  # seed 3 has no partner, and neither has seed 9
    assert ahead.difference == pytest.approx((0.05 + 0.08 + 0.15) / 3)
    expected = stats.ttest_rel([0.9, 0.92, 0.95], [0.85, 0.84, 0.8]).pvalue
    assert ahead.p == pytest.approx(expected)
    other = comparisons[("iid", 4), "kernel", "group"]
    assert other.n == 3
    smaller, larger = sorted((ahead, other), key=lambda c: c.p)
    assert smaller.p_holm == pytest.approx(min(1.0, 2 * smaller.p))
    assert larger.p_holm == pytest.approx(max(larger.p, smaller.p_holm))
    alone = comparisons[("iid", 2), "kernel", "none"]
    assert alone.n == 1
    assert math.isnan(alone.p_holm)
    assert not alone.significant


def test_no_false_winner_among_equals() -> None:
    """Five equal normalizers, two batch sizes: a false claim in at most 5 runs of 100."""
    generator = numpy_generator(2, "family")
    false_claims = 0
    for _ in range(120):
        groups = {
            ("iid", batch): {
                name: dict(enumerate(generator.normal(0.9, 0.02, 5).tolist())) for name in "abcde"
            }
            for batch in (1, 2)
        }
        false_claims += any(c.significant for c in compare_all_pairs(groups))
    assert false_claims / 120 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 120)
