from __future__ import annotations

import math

import pytest

from fedkn.tasks.metric import ACCURACY, Metric

ERROR = Metric("rmse", higher_is_better=False, lowest=0.0)


@pytest.mark.parametrize(
    ("metric", "one", "other", "better"),
    [
        (ACCURACY, 0.9, 0.8, True),
        (ACCURACY, 0.8, 0.8, False),
        (ERROR, 0.8, 0.9, True),
        (ERROR, 0.9, 0.8, False),
        (ERROR, 0.9, math.nan, True),
        (ACCURACY, math.nan, 0.0, False),
        (ACCURACY, math.nan, math.nan, False),
    ],
)
def test_which_of_two_is_better(metric: Metric, one: float, other: float, better: bool):
    assert metric.better(one, other) is better


def test_a_target_is_reached_from_the_worse_side():
    assert ACCURACY.reaches(0.8, 0.8)
    assert not ACCURACY.reaches(0.79, 0.8)
    assert ERROR.reaches(0.8, 0.8)
    assert not ERROR.reaches(0.81, 0.8)


def test_the_worst_value():
    assert ACCURACY.worst == 0.0
    assert ERROR.worst == math.inf
