"""Shades of a table that say no more than the tests: what cannot be told apart looks alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from simulations.report.verdict import Contest

__all__ = ["SHADES", "shades"]

SHADES = 5
"""Number of ``.shade-N`` in report.css, from the best on."""


def shades(contests: Sequence[Contest]) -> dict[tuple[str, int], int]:
    """Return the shade of each normalizer and batch size with a result; 0 is the best.

    Within a batch size two normalizers have the same shade if no test tells them apart, or if they
    are linked by such pairs: of three, the middle one may be told from neither of two that are told
    from one another. Shades follow the means; the last stands for all further ones. A batch size at
    which nothing is told apart has no shades. Those of different batch sizes are not compared.
    """
    found: dict[tuple[str, int], int] = {}
    for contest in contests:
        groups = sorted(_groups(contest), key=partial(_best, contest), reverse=True)
        if len(groups) > 1:
            # Of few groups the shades are as far apart as there are any.
            step = max(1, (SHADES - 1) // (len(groups) - 1))
            found |= {
                (name, contest.batch_size): min(place * step, SHADES - 1)
                for place, names in enumerate(groups)
                for name in names
            }
    return found


def _best(contest: Contest, names: Sequence[str]) -> float:
    return max(contest.metric.sign * contest.means[name] for name in names)


def _groups(contest: Contest) -> list[list[str]]:
    """The normalizers, those linked by pairs that are not told apart in one group."""
    apart = {frozenset((c.first, c.second)) for c in contest.comparisons if c.significant}
    groups: list[list[str]] = []
    for name in contest.means:
        linked = [
            group for group in groups if any(frozenset((name, of)) not in apart for of in group)
        ]
        groups = [group for group in groups if group not in linked]
        groups.append([name, *(of for group in linked for of in group)])
    return groups
