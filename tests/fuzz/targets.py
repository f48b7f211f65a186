"""What the campaign tries: by name, a function of a generator, and its share of the cases."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from tests.fuzz import server
from tests.fuzz.loaders import LOADERS

__all__ = ["TARGETS", "Target"]


class Target(NamedTuple):
    """`run` returns in a word what became of a case, and raises where the software failed.

    `share` is its part of a campaign's cases, in percent.
    """

    run: Callable[[random.Random], str]
    share: float


TARGETS = {
    "training": Target(server.training, 20),
    "joining": Target(server.joining, 20),
    "evaluating": Target(server.evaluating, 12),
    "whole-runs": Target(server.whole_runs, 0.1),
    **{name: Target(case, 47.9 / len(LOADERS)) for name, case in LOADERS.items()},
}
