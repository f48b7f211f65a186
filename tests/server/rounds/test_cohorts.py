from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.rounds.cohorts import draw_cohort

PARTITIONS = st.sets(st.integers(0, 10_000), min_size=1, max_size=60)


@given(PARTITIONS, st.data())
def test_a_cohort_is_a_sorted_set_of_the_partitions(partitions, data):
    size = data.draw(st.integers(1, len(partitions)))
    cohort = draw_cohort(partitions, size, seed=data.draw(st.integers(0, 9)), round_=3)
    assert len(cohort) == size == len(set(cohort))
    assert cohort == sorted(cohort)
    assert set(cohort) <= partitions


@given(PARTITIONS, st.randoms(use_true_random=False))
def test_neither_the_order_nor_repetitions_matter(partitions, random):
    size = max(1, len(partitions) // 2)
    shuffled = [*partitions, *partitions]
    random.shuffle(shuffled)
    expected = draw_cohort(sorted(partitions), size, seed=1, round_=2)
    assert draw_cohort(shuffled, size, seed=1, round_=2) == expected


def test_seeds_and_rounds_draw_differently():
    draws = {
        tuple(draw_cohort(range(50), 5, seed=seed, round_=round_))
        for seed in range(5)
        for round_ in range(5)
    }
    assert len(draws) == 25


def test_everybody_gets_a_turn_about_as_often():
    rounds, clients, size = 2000, 20, 5
    turns = Counter(
        partition
        for round_ in range(rounds)
        for partition in draw_cohort(range(clients), size, seed=0, round_=round_)
    )
    expected = rounds * size / clients
    deviation = (expected * (1 - size / clients)) ** 0.5
    assert all(abs(turns[p] - expected) < 5 * deviation for p in range(clients))


def test_too_few_clients():
    with pytest.raises(ValueError, match="a cohort of 3 out of 2 clients"):
        draw_cohort([4, 7], 3, seed=0, round_=1)
