"""What each setting of a factorial comparison is worth, averaged over all the others.

A run in which several things vary (normalizer, batch size, partition, further axes), every
combination of which has a result, is a factorial experiment. The main effect of one of them is the
difference between its values, each averaged over all combinations of the others. An interaction of
two, of two values each, is half the difference between what the one is worth at the two values of
the other (Montgomery, Design and Analysis of Experiments, chapter 6: effects AB of a 2^k design).
All is worked out seed by seed and tested over the seeds like any pair, which is sharper than pairs
of single cells: every cell tells of every effect. The effects of a run are one family for Holm's
correction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from fedkn.tasks.metric import Metric
from simulations.report import formats
from simulations.report.axes import NORMALIZER, Spot
from simulations.report.entries import Entry
from simulations.runs.statistics import Comparison, compare_all_pairs

__all__ = ["Effect", "Varied", "effect_sentences", "effects_of"]

Varied = tuple[str, ...]
"""The names of what varies: one of a main effect, two of an interaction."""


@dataclass(frozen=True)
class Effect:
    """What one value is worth against another, or one pairing of values against the other.

    Attributes:
        of: what varies.
        cells: of how many combinations each of the two means is.
        comparison: the test over the seeds, in values of `metric`. Its names are values; of an
            interaction they are pairings, "a1 with b1, a2 with b2".
    """

    of: Varied
    cells: int
    comparison: Comparison
    metric: Metric

    @property
    def label(self) -> str:
        """What varies, in words."""
        return " and ".join(self.of)


def effects_of(
    entries: Mapping[Spot, Entry],
    final: Callable[[Entry], Mapping[int, float]],
    basis: Callable[[Spot], object],
) -> list[Effect]:
    """Return the main effects, then the interactions, of what `final` gives of one run's entries.

    Empty where fewer than two things vary, where a combination has no result or no seed is common
    to all, and where entries are not judged by the same metric on the same examples, of which
    `basis` tells.
    """
    results = {spot: by_seed for spot, entry in entries.items() if (by_seed := final(entry))}
    levels = _levels(results)
    if (
        len(levels) < 2
        or len(results) < math.prod(map(len, levels.values()))
        or len({basis(spot) for spot in results}) > 1
    ):
        return []
    seeds = frozenset.intersection(*(frozenset(by_seed) for by_seed in results.values()))
    names = list(levels)
    values = {tuple(map(_place(spot).__getitem__, names)): of for spot, of in results.items()}
    scores: dict[Varied, dict[str, dict[int, float]]] = {}
    for at, name in enumerate(names):
        scores[name,] = {level: _mean(values, (at,), {(level,)}, seeds) for level in levels[name]}
    for at, other_at in combinations(range(len(names)), 2):
        one, other = names[at], names[other_at]
        if len(levels[one]) == len(levels[other]) == 2:
            scores[one, other] = {
                _pairing(pairs): _mean(values, (at, other_at), set(pairs), seeds)
                for pairs in _pairings(levels[one], levels[other])
            }
    metric = entries[next(iter(results))].metric
    tests = compare_all_pairs(scores, dict.fromkeys(scores, metric)) if seeds else []
    return [
        Effect(of, len(values) // len(of_names), test, metric)
        for of, of_names in scores.items()
        for test in tests
        if test.group == of
    ]


def effect_sentences(effects: Sequence[Effect], *, so_far: bool = False) -> list[str]:
    """Return what the effects show, in one sentence, the largest first; none if there are none."""
    tested = [effect for effect in effects if not math.isnan(effect.comparison.p)]
    if not tested:
        return []
    start = "So far, averaged over all else" if so_far else "Averaged over all else"
    shown = sorted(
        (effect for effect in tested if effect.comparison.significant),
        key=lambda effect: -effect.comparison.difference,
    )
    if not shown:
        return [f"{start}, none of {len(tested)} main effects and interactions is shown."]
    clauses = [_clause(effect) for effect in shown[:_SHOWN]]
    if len(shown) > _SHOWN:
        clauses.append(f"{len(shown) - _SHOWN} more are told apart")
    if rest := len(tested) - len(shown):
        clauses.append(
            f"of the other {rest} main effects and interactions none is shown"
            if rest > 1
            else "the other main effect or interaction is not shown"
        )
    return [f"{start}: {'; '.join(clauses)}."]


_SHOWN = 6
_PARTITION = "partition"
_BATCH_SIZE = "batch size"


def _place(spot: Spot) -> dict[str, str]:
    return {
        NORMALIZER: spot.normalizer,
        _BATCH_SIZE: str(spot.batch_size),
        _PARTITION: spot.partition,
        **dict(spot.point),
    }


def _levels(spots: Iterable[Spot]) -> dict[str, list[str]]:
    """The values, in their order, of everything that has more than one."""
    found: dict[str, dict[str, None]] = {}
    for spot in spots:
        for name, value in _place(spot).items():
            found.setdefault(name, {})[value] = None
    return {name: list(values) for name, values in found.items() if len(values) > 1}


def _mean(
    values: Mapping[tuple[str, ...], Mapping[int, float]],
    at: Sequence[int],
    wanted: Collection[tuple[str, ...]],
    seeds: Iterable[int],
) -> dict[int, float]:
    """By seed the mean of the cells whose values at the places `at` are wanted."""
    of = [by_seed for cell, by_seed in values.items() if tuple(cell[i] for i in at) in wanted]
    return {seed: fmean(by_seed[seed] for by_seed in of) for seed in seeds}


def _pairings(
    one: Sequence[str], other: Sequence[str]
) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    return tuple(zip(one, other, strict=True)), tuple(zip(one, reversed(other), strict=True))


def _pairing(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{one or 'empty'} with {other or 'empty'}" for one, other in pairs)


def _clause(effect: Effect) -> str:
    test = effect.comparison
    by = formats.difference_with_unit(test.difference, effect.metric)
    first, second = (name or "empty" for name in (test.first, test.second))
    if len(effect.of) > 1:
        return f"{effect.label} depend on each other, {first} being better by {by} than {second}"
    return f"{effect.label} {first} is ahead of {second} by {by}"
