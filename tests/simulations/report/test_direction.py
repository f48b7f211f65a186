"""A metric and its mirror image come out mirrored: nothing knows which way is up but the metric."""

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedkn.seeds import numpy_generator
from fedkn.tasks.metric import ACCURACY, Metric
from simulations.report import build_report, summary_dict
from simulations.report.summary import Section, summarize
from simulations.runs.statistics import (
    compare_all_pairs,
    mean_interval,
    rounds_to_target,
)
from tests.simulations.report.made_runs import made_run

UP = Metric("score", True, 0.0, 1.0, "")
DOWN = Metric("score", False, -1.0, 0.0, "")
NAMES = ("kernel", "ws_group", "group", "none")
SKILL = {"kernel": 0.96, "ws_group": 0.95, "group": 0.8, "none": 0.3}


def score(name: str, size: int, point: Mapping[str, Any], seed: int) -> float:
    generator = numpy_generator(seed, name, size, str(point))
    value = SKILL[name] + 0.02 * generator.normal() + 0.05 * bool(point.get("train.momentum"))
    return float(min(1.0, max(0.0, value)))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("mirrored")
    given_ = {"normalizers": NAMES, "batch_sizes": (2, 8), "seeds": range(5)}
    axes = {"train.momentum": [0.0, 0.9]}
    up = made_run(folder / "up", score, metric=UP, axes=axes, evaluation__target=0.9, **given_)
    down = made_run(
        folder / "down",
        lambda *where: -score(*where),
        metric=DOWN,
        axes=axes,
        evaluation__target=-0.9,
        **given_,
    )
    return up, down


def test_every_test_is_the_mirrored_one_exactly(both: tuple[Any, Any]) -> None:
    (up,), (down,) = (summarize([run]) for run in both)
    assert len(up.comparisons) > 20
    for one, other in zip(up.comparisons, down.comparisons, strict=True):
        assert (one.first, one.second, one.n) == (other.first, other.second, other.n)
        assert (one.difference, one.half_width) == (other.difference, other.half_width)
        assert (one.low, one.high, one.p, one.p_holm) == (
            *(other.low, other.high, other.p, other.p_holm),
        )
        assert one.detectable == pytest.approx(other.detectable, nan_ok=True, abs=0)
    assert any(c.significant for c in up.comparisons)
    assert not all(c.significant for c in up.comparisons)


def test_the_verdict_is_the_mirrored_one(both: tuple[Any, Any]) -> None:
    (up,), (down,) = (summarize([run]) for run in both)
    for one, other in zip(up.sections, down.sections, strict=True):
        assert _mirrored(other.verdict) == one.verdict
        for size in (2, 8):
            ranked = [[e.normalizer for e in of.ranked(size)] for of in (one, other)]
            assert ranked[0] == ranked[1]
        for a, b in zip(one.contests, other.contests, strict=True):
            assert (a.winner, a.behind(), a.level()) == (b.winner, b.behind(), b.level())
        _same_rounds(one, other)
    assert [_mirrored(text) for text in down.axis_verdicts] == up.axis_verdicts


def test_intervals_are_the_mirrored_ones_within_the_range(both: tuple[Any, Any]) -> None:
    (up,), (down,) = (summarize([run]) for run in both)
    cut = 0
    for one, other in zip(up.sections, down.sections, strict=True):
        for key, entry in one.entries.items():
            a, b = entry.accuracy, other.entries[key].accuracy
            assert (a.mean, a.low, a.high) == (-b.mean, -b.high, -b.low)
            assert 0 <= a.low <= a.mean <= a.high <= 1
            cut += a.cut
    assert cut


def test_pages_of_both_directions_are_built(both: tuple[Any, Any]) -> None:
    for run, best in zip(both, ("highest", "lowest"), strict=True):
        text = build_report(run).read_text(encoding="utf-8")
        assert f"{best} mean" in text
        section = summary_dict(run)["partitions"][0]
        assert section["metric"]["higher_is_better"] is (best == "highest")


def _mirrored(text: str) -> str:
    """A sentence on the mirrored metric as it is of the metric itself."""
    swapped = re.sub(r"-([\d.]+) to -([\d.]+)", r"\2–\1", text)
    return re.sub(r"(\(|with )-", r"\1", swapped.replace("lowest", "highest"))


def _same_rounds(one: Section, other: Section) -> None:
    for key, entry in one.entries.items():
        assert entry.reached == other.entries[key].reached
        assert any(number is not None for number in entry.reached.values()) or key[0] in (
            *("group", "none"),
        )


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.sampled_from([(-math.inf, math.inf), (0.0, 1.0), (0.0, math.inf)]),
)
@settings(deadline=None, max_examples=200)
def test_an_interval_is_the_t_interval_cut_to_the_range(
    values: list[float], ends: tuple[float, float]
) -> None:

    interval = mean_interval(values, *ends)
    if len(values) < 2:
        assert math.isnan(interval.low)
        assert not interval.cut
        return
    error = stats.sem(values)
    low, high = (
        stats.t.interval(0.95, len(values) - 1, interval.mean, error)
        if error
        else (interval.mean, interval.mean)
    )
    assert interval.low == pytest.approx(max(low, ends[0]), abs=1e-12)
    assert interval.high == pytest.approx(min(high, ends[1]), abs=1e-12)
    assert interval.low <= interval.mean + 1e-12
    assert interval.mean <= interval.high + 1e-12
    assert interval.cut == (
        interval.mean - interval.half_width < ends[0]
        or interval.mean + interval.half_width > ends[1]
    )


def test_a_cut_interval_covers_as_often_as_a_whole_one() -> None:
    """Means near the end of the range: what lies beyond it never held the true mean."""
    generator = numpy_generator(3, "coverage")
    truth, covered, whole = 0.985, 0, 0
    for values in generator.normal(truth, 0.03, size=(3000, 4)):
        interval = mean_interval(values.tolist(), 0.0, 1.0)
        covered += interval.low <= truth <= interval.high
        whole += abs(interval.mean - truth) <= interval.half_width
    assert covered == whole
    assert covered / 3000 == pytest.approx(0.95, abs=0.015)


def test_no_difference_beyond_the_range_is_detectable() -> None:
    wild = {
        "a": {0: 0.0, 1: 1.0, 2: 0.1},
        "b": {0: 1.0, 1: 0.0, 2: 0.3},
        "c": {0: 0.5, 1: 0.51, 2: 0.49},
        "d": {0: 0.5, 1: 0.512, 2: 0.488},
    }
    found = {(c.first, c.second): c for c in compare_all_pairs({"here": wild})}
    for comparison in found.values():
        assert comparison.detectable <= 1 or comparison.detectable == math.inf
        assert -1 <= comparison.low <= comparison.high <= 1
    assert {c.detectable == math.inf for c in found.values()} == {True, False}
    # Without a bound every difference is possible.
    free = compare_all_pairs({"here": wild}, {"here": Metric("rmse", False)})
    assert all(math.isfinite(c.detectable) for c in free)


@given(
    st.dictionaries(
        st.integers(0, 30), st.one_of(st.floats(-10, 10), st.just(math.nan)), max_size=10
    ),
    st.floats(-10, 10),
)
@settings(deadline=None, max_examples=100)
def test_rounds_to_target_are_the_mirrored_ones(values: dict[int, float], target: float) -> None:
    free, mirrored = Metric("x"), Metric("-x", False)
    flipped = {number: -value for number, value in values.items()}
    expected = rounds_to_target(values, target, free)
    assert rounds_to_target(flipped, -target, mirrored) == expected
    reached = sorted(number for number, value in values.items() if value >= target)
    assert expected == (reached[0] if reached else None)


def test_scale_does_not_decide() -> None:
    """The same results in other units have the same p-values, tiny and huge."""
    scores = {
        "a": {0: 0.5, 1: 0.52, 2: 0.47, 3: 0.5},
        "b": {0: 0.4, 1: 0.41, 2: 0.4, 3: 0.38},
    }
    (expected,) = compare_all_pairs({"here": scores}, {"here": Metric("x")})
    for scale in (2.0**-60, 2.0**60):
        scaled = {name: {s: scale * v for s, v in of.items()} for name, of in scores.items()}
        (found,) = compare_all_pairs({"here": scaled}, {"here": Metric("x")})
        assert found.p == expected.p
        assert found.difference == scale * expected.difference
    assert expected.p < 0.05
    assert ACCURACY.higher_is_better
