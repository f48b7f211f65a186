"""Two values that no test tells apart look alike; those that look different are told apart."""

from itertools import combinations

from fedkn.tasks.metric import ACCURACY, Metric
from simulations.report.shades import SHADES, shades
from simulations.report.verdict import Contest
from simulations.runs.statistics import Comparison

ERROR = Metric("error", higher_is_better=False)


def contest(
    means: dict[str, float], apart: set[frozenset[str]], metric: Metric = ACCURACY
) -> Contest:
    comparisons = [
        Comparison(
            group=("p", 2),
            first=one,
            second=other,
            n=5,
            difference=abs(means[one] - means[other]),
            half_width=0.0,
            p=0.001,
            p_holm=0.01 if frozenset((one, other)) in apart else 0.5,
            detectable=0.1,
        )
        for one, other in combinations(means, 2)
    ]
    return Contest(2, means, comparisons, metric=metric)


def pairs(*names: str) -> set[frozenset[str]]:
    return {frozenset(pair) for pair in combinations(names, 2)}


def test_the_best_that_are_not_told_apart_share_the_strongest_shade() -> None:
    means = {"a": 0.9, "b": 0.89, "c": 0.5}
    found = shades([contest(means, {frozenset("ac"), frozenset("bc")})])
    assert found == {("a", 2): 0, ("b", 2): 0, ("c", 2): SHADES - 1}


def test_a_middle_one_links_two_that_are_told_apart() -> None:
    means = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.1}
    apart = pairs(*means) - {frozenset("ab"), frozenset("bc")}
    found = shades([contest(means, apart)])
    assert found == {("a", 2): 0, ("b", 2): 0, ("c", 2): 0, ("d", 2): SHADES - 1}


def test_where_nothing_is_told_apart_or_tested_there_is_no_shade() -> None:
    means = {"a": 0.9, "b": 0.1}
    assert shades([contest(means, set())]) == {}
    assert shades([Contest(2, means)]) == {}
    assert shades([Contest(2, {"a": 0.9})]) == {}


def test_the_best_is_the_lowest_where_lower_is_better() -> None:
    means = {"a": 3.0, "b": 1.0, "c": 2.0}
    found = shades([contest(means, pairs(*means), ERROR)])
    assert found == {("b", 2): 0, ("c", 2): 2, ("a", 2): 4}


def test_further_groups_share_the_last_shade() -> None:
    means = {name: 1 - place / 10 for place, name in enumerate("abcdefg")}
    found = shades([contest(means, pairs(*means))])
    assert [found[name, 2] for name in "abcdefg"] == [0, 1, 2, 3, 4, *[SHADES - 1] * 2]
