from __future__ import annotations

import math

from simulations.benchmarks.together import Comparison, measure


def test_both_ways_are_timed():
    alone, together, ratio = measure(Comparison("convnet3", 4, 8, "group", 2), repetitions=1)
    assert alone > 0
    assert math.isclose(together / alone, ratio)
