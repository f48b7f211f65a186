"""Which clients train in a round: a pure function of the seed and the round."""

from __future__ import annotations

from collections.abc import Iterable

from fedkn.seeds import numpy_generator

__all__ = ["draw_cohort"]


def draw_cohort(partitions: Iterable[int], size: int, *, seed: int, round_: int) -> list[int]:
    """Return `size` of the `partitions`, drawn without replacement, in ascending order.

    The draw depends on the set of partitions, the seed and the round, and on nothing else: not on
    node ids, on the order of joining or on earlier rounds.

    Raises:
        ValueError: if there are fewer than `size` partitions.
    """
    known = sorted(set(partitions))
    if size > len(known):
        raise ValueError(f"a cohort of {size} out of {len(known)} clients")
    chosen = numpy_generator(seed, "cohort", round_).choice(len(known), size, replace=False)
    return sorted(known[i] for i in chosen)
