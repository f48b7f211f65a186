"""What the campaign tries: by name, a function of a generator, and its share of the cases."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from tests.fuzz import server

__all__ = ["TARGETS", "Target"]


class Target(NamedTuple):
    """`run` returns in a word what became of a case, and raises where the software failed."""

    run: Callable[[random.Random], str]
    share: float


TARGETS = {
    "training": Target(server.training, 38),
    "joining": Target(server.joining, 15),
    "evaluating": Target(server.evaluating, 10),
    "whole-runs": Target(server.whole_runs, 0.2),
}
