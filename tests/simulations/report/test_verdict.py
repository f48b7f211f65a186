"""The verdict says what the tests say, and no more."""

import math

import pytest

from fedkn.tasks.metric import Metric
from simulations.report.power import what_own_models_show, what_the_seeds_show
from simulations.report.verdict import (
    Contest,
    enumerated,
    verdict,
    verdicts,
)
from simulations.runs.statistics import Comparison


def against(first: str, second: str, p_holm: float, difference: float = 0.03) -> Comparison:
    return Comparison(("iid", 2), first, second, 5, difference, 0.01, p_holm, p_holm, 0.02)


def test_the_winner_is_whoever_wins() -> None:
    means = {"kernel": 0.80, "group": 0.95, "none": 0.3}
    comparisons = [against("group", "kernel", 0.01, 0.15), against("group", "none", 0.001, 0.65)]
    text = verdict([Contest(2, means, comparisons)])
    ahead = "group (95.0%) is ahead of every other normalizer at batch size 2"
    assert text == f"{ahead}, by at least 15.0 points."


def test_level_is_not_called_a_win() -> None:
    comparisons = [against("kernel", "group", 0.06), against("kernel", "none", 0.01)]
    text = verdict([Contest(2, {"kernel": 0.95, "group": 0.93, "none": 0.3}, comparisons)])
    assert "cannot be told apart from group" in text
    assert text.endswith("and is ahead of none.")


def test_all_level_is_said_once_whoever_is_highest() -> None:
    names = ("kernel", "group", "none")

    def contest(size: int, *means: float) -> Contest:
        by_name = dict(zip(names, means, strict=True))
        first, *others = sorted(names, key=lambda name: -by_name[name])
        return Contest(size, by_name, [against(first, other, 0.5) for other in others])

    text = verdict([contest(2, 0.95, 0.94, 0.93), contest(8, 0.94, 0.96, 0.93)])
    assert text == (
        "No difference between the normalizers is shown at any batch size (2 and 8) "
        "(highest means: kernel with 95.0%, group with 96.0%)."
    )


def test_a_difference_between_others_than_the_winner_is_not_denied() -> None:
    names = ("batch", "kernel", "group")
    means = dict(zip(names, (0.8, 0.7, 0.5), strict=True))
    pairs = [against("batch", "kernel", 0.9), against("batch", "group", 0.7)]
    shown = [*pairs, against("kernel", "group", 1e-5)]
    text = verdict([Contest(2, means, shown)])
    assert text == (
        "batch has the highest mean (80.0%) at batch size 2 but cannot be told apart from "
        "kernel and group, while kernel is ahead of group."
    )
    level = verdict([Contest(2, means, shown), Contest(4, means, pairs)])
    assert "kernel is ahead of group; no difference" in level
    assert "is shown at batch size 4" in level
    alone = [against("batch", "kernel", math.nan), against("kernel", "group", 1e-5)]
    text = verdict([Contest(2, means, alone)])
    assert text.endswith("no difference from it can be shown, while kernel is ahead of group.")


def test_of_many_the_nearest_are_named_and_the_rest_are_counted() -> None:
    names = [f"n{place:02}" for place in range(19)]
    means = {name: 0.5 + 0.02 * place for place, name in enumerate(names)}
    best, others = names[-1], names[:-1]
    level = [against(best, other, 0.5) for other in others]
    pairs = [
        against(others[b], others[a], 1e-5, 0.02 * (b - a)) for b in range(18) for a in range(b)
    ]
    text = verdict([Contest(2, means, [*level, *pairs], untrained=["a", "b", "c", "d", "e", "f"])])
    assert "cannot be told apart from n17, n16, n15, n14 and 14 others, while " in text
    assert "n17 is ahead of n00" in text
    assert "and 149 other pairs are told apart" in text
    assert text.endswith("; a, b, c, d and 2 others have no result at batch size 2.")
    assert len(text) < 400


def test_one_more_than_are_named_is_named_too() -> None:
    means = {"w": 0.9, "a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4, "e": 0.5}
    level = [against("w", other, 0.5) for other in "abcde"]
    text = verdict([Contest(2, means, [*level, against("e", "a", 0.01)])])
    assert "cannot be told apart from a, b, c, d and e, while e is ahead of a." in text
    text = verdict(
        [Contest(1, {**means, "f": 0.6}, [*level, against("w", "f", 0.5), against("e", "a", 0.01)])]
    )
    assert "cannot be told apart from f, e, d, c and 2 others" in text


def test_lower_is_better_names_the_lowest() -> None:
    rmse = Metric("rmse", higher_is_better=False, lowest=0.0)
    means = {f"n{place}": float(place) for place in range(8)}
    level = [against("n0", name, 0.5, 1.0) for name in list(means)[1:]]
    shown = against("n1", "n7", 0.001, 6.0)
    text = verdict([Contest(2, means, [*level, shown], metric=rmse)])
    assert "cannot be told apart from n1, n2, n3, n4 and 3 others, while n1 is ahead of n7" in text


def test_batch_sizes_that_came_out_alike_share_a_clause() -> None:
    def contest(size: int, p: float) -> Contest:
        return Contest(size, {"kernel": 0.95, "group": 0.9}, [against("kernel", "group", p)])

    assert "at every batch size (1, 2 and 4)" in verdict([contest(s, 0.01) for s in (1, 2, 4)])
    mixed = verdict([contest(1, 0.01), contest(2, 0.01), contest(8, 0.5)])
    assert "ahead of group at batch sizes 1 and 2" in mixed
    assert "at batch size 8 but cannot be told apart from group" in mixed


def test_every_batch_size_is_not_claimed_where_one_has_no_result() -> None:
    known = Contest(2, {"kernel": 0.95, "group": 0.9}, [against("kernel", "group", 0.01)])
    assert "every batch size" not in verdict([known, Contest(4, {})])


def test_untested_and_lonely_results_claim_nothing() -> None:
    untested = Contest(2, {"kernel": 0.9, "group": 0.8}, [against("kernel", "group", math.nan)])
    assert "no difference from it can be shown" in verdict([untested])
    assert verdict([Contest(2, {"kernel": 0.9})]) == "kernel has 90.0% at batch size 2."
    alone = "kernel (90.0%) alone has results at batch size 2"
    assert verdict([Contest(2, {"kernel": 0.9}, entrants=2)], so_far=True) == f"So far, {alone}."
    lost = Contest(2, {"kernel": 0.9}, lost={"group": 3}, untrained=["group"])
    assert verdict([lost]) == f"{alone}; group has no result at batch size 2."
    assert "nothing to compare" in verdict([Contest(2, {})])
    assert "nothing to compare" in verdict([])


def test_what_the_means_leave_out_is_said() -> None:
    comparisons = [against("kernel", "group", 0.01)]
    means = {"kernel": 0.95, "group": 0.9}
    text = verdict(
        [Contest(1, means, comparisons, lost={"kernel": 2, "batch": 5}, untrained=["batch"])]
    )
    assert "kernel's mean at batch size 1 leaves out 2 cells without a result" in text
    assert "batch has no result at batch size 1" in text
    assert verdict([Contest(1, means, comparisons)], so_far=True).startswith("So far, ")


def test_what_the_seeds_show_names_the_floor_of_the_exact_test() -> None:
    comparisons = [against("kernel", "group", 0.01), against("kernel", "none", 0.01)]
    contest = Contest(2, {"kernel": 0.95, "group": 0.9, "none": 0.1}, comparisons)
    text = what_the_seeds_show(comparisons, [contest])
    assert "all 2 pairs" in text
    assert "no p-value below 0.062" in text
    assert "2.0 points" in text
    assert "No test was possible" in what_the_seeds_show([], [])


@pytest.mark.parametrize(
    ("items", "text"), [([], ""), (["a"], "a"), ([1, 2], "1 and 2"), ("abc", "a, b and c")]
)
def test_enumerated(items: list[object], text: str) -> None:
    assert enumerated(items) == text


def test_who_keeps_tensors_is_named_and_not_beaten() -> None:
    shared = [Contest(2, {"kernel": 0.9, "group": 0.8}, [against("kernel", "group", 0.01)])]
    own = [Contest(2, {"fedbn": 0.95, "kernel": 0.9}, [against("fedbn", "kernel", 0.01)])]
    first, note, last = verdicts(shared, own, ["fedbn", "silobn"])
    assert first == "kernel (90.0%) is ahead of group at batch size 2, by 3.0 points."
    assert note.startswith("fedbn and silobn keep tensors on the clients")
    assert last.startswith("On the clients' own images: fedbn (95.0%) is ahead of kernel")


def test_every_other_normalizer_does_not_include_who_is_left_out() -> None:
    comparisons = [against("a", "b", 0.01), against("a", "c", 0.01)]
    contest = Contest(2, {"a": 0.9, "b": 0.8, "c": 0.7}, comparisons)
    ahead = "is ahead of every other normalizer that shares all its tensors at batch size 2"
    assert ahead in verdicts([contest], [], ["fedbn"])[0]
    assert "that shares" not in verdicts([contest], [], [])[0]
    level = Contest(2, contest.means, [against("a", "b", 0.5), against("a", "c", 0.5)])
    assert "between the normalizers that share all their" in verdicts([level], [], ["fedbn"])[0]
    alone = verdicts([Contest(2, {"a": 0.9})], [], ["fedbn"])[0]
    assert alone == "a (90.0%) is the only one that shares all its tensors at batch size 2."


def test_a_normalizer_without_a_result_is_named_once() -> None:
    means, compared = {"kernel": 0.9, "group": 0.8}, [against("kernel", "group", 0.01)]
    both = [Contest(1, means, compared, untrained=["batch"])]
    own = [Contest(1, means, compared, untrained=["batch", "fedbn"])]
    first, _, last = verdicts(both, own, ["fedbn"])
    assert "batch has no result at batch size 1" in first
    assert "fedbn has no result at batch size 1" in last
    assert "batch has" not in last.replace("fedbn has", "")


@pytest.mark.parametrize(
    ("failed", "said"), [({"a": 3}, True), ({"a": 3, "b": 1}, True), ({"a": 3, "b": 3}, False)]
)
def test_only_what_favours_the_winner_is_said_of_clients_left_out(
    failed: dict[str, int], said: bool
) -> None:
    contest = Contest(2, {"a": 0.9, "b": 0.8}, [against("a", "b", 0.01)], failed_clients=failed)
    assert ("leaves out clients whose model" in verdict([contest])) is said


def test_own_models_are_a_family_of_their_own_or_nothing() -> None:
    compared = [against("a", "b", 0.01)]
    text = what_own_models_show(compared, [Contest(2, {"a": 0.9, "b": 0.8}, compared)])
    assert "corrected over 1 pair of it and not together with those on the global model" in text
    assert "2.0 points" in text
    assert what_own_models_show([against("a", "b", math.nan)], []) == ""
