"""The verdict: in one honest sentence which normalizer to choose, from the tests alone.

Where the clients' own models were evaluated too, a second sentence is on them: another question,
whose tests are a family of their own. A normalizer is "ahead" of another only where the corrected
test says so. Where it does not, the sentence says that they cannot be told apart, which does not
mean that they are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedkn.tasks.metric import ACCURACY, Metric
from simulations.report import formats
from simulations.runs.statistics import FEWEST_SEEDS, Comparison

__all__ = [
    "Contest",
    "enumerated",
    "shortened",
    "verdict",
    "verdicts",
]


@dataclass(frozen=True)
class Contest:
    """The normalizers of one partition at one batch size, or whatever else competes.

    Attributes:
        batch_size: the local batch size.
        means: mean final value of `metric` of each normalizer with a result.
        comparisons: all pairs of them.
        lost: how many of a normalizer's cells have no result for ever (failed, NaN), if any.
        untrained: normalizers without any result, all their cells having ended.
        failed_clients: how many clients a normalizer's mean over clients leaves out, if any.
        metric: by what they are judged, and which way.
        entrants: how many were to take part; of a single one there is nothing to contest.
    """

    batch_size: int
    means: Mapping[str, float]
    comparisons: Sequence[Comparison] = ()
    lost: Mapping[str, int] = field(default_factory=dict)
    untrained: Sequence[str] = ()
    failed_clients: Mapping[str, int] = field(default_factory=dict)
    metric: Metric = ACCURACY
    entrants: int = 0

    @property
    def winner(self) -> str:
        """The normalizer with the best mean; empty where none has a result."""
        sign = self.metric.sign
        return max(self.means, key=lambda name: sign * self.means[name], default="")

    @property
    def alone(self) -> bool:
        """Whether there is a single normalizer, so that nothing is contested."""
        known = {*self.means, *self.untrained, *self.lost}
        return len(known) == 1 and self.entrants <= 1

    @property
    def best(self) -> str:
        """What the best mean is: "highest" or "lowest"."""
        return "highest" if self.metric.higher_is_better else "lowest"

    def against_winner(self) -> list[Comparison]:
        """Return the comparisons of the winner with each other normalizer."""
        winner = self.winner
        return [c for c in self.comparisons if winner in (c.first, c.second)]

    def behind(self) -> list[str]:
        """Return the normalizers that the test tells apart from the winner."""
        names = [_other(c, self.winner) for c in self.against_winner() if c.significant]
        return [name for name in self.means if name in names]

    def level(self) -> list[str]:
        """Return the normalizers that the test cannot tell apart from the winner."""
        behind = self.behind()
        return [name for name in self.means if name != self.winner and name not in behind]

    def apart(self) -> list[Comparison]:
        """Return the comparisons without the winner that show a difference."""
        winner = self.winner
        return [c for c in self.comparisons if c.significant and winner not in (c.first, c.second)]

    @property
    def undecided(self) -> bool:
        """Whether the tests tell no two of three or more normalizers apart."""
        return self.tested and len(self.means) > 2 and not self.behind() and not self.apart()

    @property
    def tested(self) -> bool:
        """Whether any comparison with the winner had enough seeds for a test."""
        return any(not math.isnan(c.p) for c in self.against_winner())


def verdict(contests: Sequence[Contest], so_far: bool = False) -> str:
    """Return the verdict over the batch sizes of one partition, as one sentence.

    `so_far`: cells are still missing.
    """
    return _verdict(contests, so_far, rest="")


def verdicts(
    contests: Sequence[Contest],
    own_contests: Sequence[Contest],
    keepers: Sequence[str],
    so_far: bool = False,
) -> list[str]:
    """Return the sentences of the verdict over the batch sizes of one partition.

    Args:
        contests: of the global model, without `keepers`.
        own_contests: of the clients' own models; empty where there is nothing on them.
        keepers: normalizers that keep tensors on the clients. They are no losers of a contest of
            global models, which lack these tensors, and are left out of it by name.
        so_far: cells are still missing.
    """
    sentences = []
    if not keepers or any(contest.means for contest in contests):
        rest = _SHARING if keepers else ""
        sentences.append(_verdict(contests, so_far, rest))
    if keepers:
        keep = "keeps tensors" if len(keepers) == 1 else "keep tensors"
        sentences.append(
            f"{shortened(keepers, keepers.index)} {keep} on the clients, which the global model "
            "lacks: see the clients' own models."
        )
    if any(contest.means for contest in own_contests):
        named = {(c.batch_size, name) for c in contests for name in c.untrained}
        news = [
            replace(c, untrained=[n for n in c.untrained if (c.batch_size, n) not in named])
            for c in own_contests
        ]
        start = "On the clients' own images, so far: " if so_far else "On the clients' own images: "
        sentences.append(f"{start}{_sentence(news, rest='')}.")
    return sentences


def enumerated(items: Sequence[object], last: str = "and") -> str:
    """Return "a", "a and b", "a, b and c"; `last` is the word before the last."""
    texts = [str(item) for item in items]
    return f" {last} ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def shortened(names: Sequence[str], first: Callable[[str], float]) -> str:
    """Return the names enumerated, of many the four that come `first` and a count.

    `first` is the smaller the earlier a name is to be told.
    """
    if len(names) <= _NAMED + 1:  # "1 other" is no shorter than its name
        return enumerated(names)
    return enumerated([*sorted(names, key=first)[:_NAMED], f"{len(names) - _NAMED} others"])


_NAMED = 4
"""Names or pairs in a sentence, beyond which they are counted: of 19 nobody reads on."""

# What sets those in a contest apart from the normalizers that are left out of it.
_SHARING = "that shares all its tensors"


def _verdict(contests: Sequence[Contest], so_far: bool, rest: str) -> str:
    if not any(contest.means for contest in contests):
        return "No cell has ended with a result, so there is nothing to compare."
    sentence = _sentence(contests, rest)
    if so_far:
        return f"So far, {sentence}."
    # A sentence may begin with the name of a normalizer, which is spelled as it is.
    return f"N{sentence[1:]}." if sentence.startswith("no difference") else f"{sentence}."


def _sentence(contests: Sequence[Contest], rest: str) -> str:
    """The verdict without capital and full stop; `rest` tells which normalizers there are."""
    decided = [contest for contest in contests if contest.means]
    outcomes: dict[tuple[object, ...], list[Contest]] = {}
    key: tuple[object, ...]
    for contest in decided:
        level, behind = frozenset(contest.level()), bool(contest.behind())
        key = (contest.winner, contest.tested, level, behind, "" if behind else _while(contest))
        key += (contest.metric, contest.alone)
        if contest.undecided:
            key = ("level",)
        outcomes.setdefault(key, []).append(contest)
    everywhere = len(outcomes) == 1 and len(decided) == len(contests) > 1
    clauses = [_outcome(alike, everywhere, rest) for alike in outcomes.values()]
    return "; ".join(clauses + _exceptions(contests))


def _outcome(alike: Sequence[Contest], everywhere: bool, rest: str) -> str:
    """The clause for the batch sizes that came out alike."""
    first = alike[0]
    where = _where([contest.batch_size for contest in alike], everywhere)
    winner, level = first.winner, first.level()
    mean = _values([contest.means[winner] for contest in alike], first.metric)
    behind = {name for contest in alike for name in contest.behind()}
    if not level and not behind:
        return f"{_lonely(first, mean, rest)} {where}"
    if not first.tested:
        return (
            f"{winner} has the {first.best} {first.metric.name} ({mean}) {where}, but with fewer "
            f"than {FEWEST_SEEDS} common seeds no difference from it can be shown{_while(first)}"
        )
    if first.undecided:
        best = [f"{c.winner} with {formats.value(c.means[c.winner], c.metric)}" for c in alike]
        means = f"{first.best} mean{'s' if len(alike) > 1 else ''}: {', '.join(best)}"
        who = "normalizers that share all their tensors" if rest else "normalizers"
        nowhere = _nowhere([contest.batch_size for contest in alike], everywhere)
        return f"no difference between the {who} is shown {nowhere} ({means})"
    others = f"every other normalizer {rest}".rstrip()
    rivals = next(iter(behind)) if len(behind) == 1 else others
    if level:
        rest = f", and is ahead of {rivals}" if behind else _while(first)
        return (
            f"{winner} has the {first.best} mean ({mean}) {where} but cannot be told apart from "
            f"{shortened(level, lambda name: -first.metric.sign * first.means[name])}{rest}"
        )
    margins = [c.difference for contest in alike for c in contest.against_winner()]
    least = "by" if len(margins) == 1 else "by at least"
    margin = formats.difference_with_unit(min(margins), first.metric)
    return f"{winner} ({mean}) is ahead of {rivals} {where}, {least} {margin}"


def _lonely(contest: Contest, mean: str, rest: str) -> str:
    """What is to be said of the only one with a result."""
    if rest:
        return f"{contest.winner} ({mean}) is the only one {rest}"
    if contest.alone:
        return f"{contest.winner} has {_named(mean, contest.metric)}"
    return f"{contest.winner} ({mean}) alone has results"


def _exceptions(contests: Sequence[Contest]) -> list[str]:
    """Clauses on what the means leave out: cells without a result favour who lost them."""
    clauses = []
    untrained: dict[str, list[int]] = {}
    for contest in contests:
        for name in contest.untrained:
            untrained.setdefault(name, []).append(contest.batch_size)
        lost = contest.lost.get(contest.winner, 0)
        if lost:
            cells = "1 cell" if lost == 1 else f"{lost} cells"
            clauses.append(
                f"{contest.winner}'s mean at batch size {contest.batch_size} leaves out {cells} "
                "without a result"
            )
        # Clients who have no image to evaluate on are left out for every normalizer alike.
        failed = [contest.failed_clients.get(name, 0) for name in contest.means]
        of_winner = contest.failed_clients.get(contest.winner, 0)
        if of_winner > min(failed, default=0):
            clauses.append(
                f"{contest.winner}'s mean at batch size {contest.batch_size} leaves out clients "
                f"whose model could not be evaluated ({of_winner}×, others {min(failed)}×)"
            )
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, sizes in untrained.items():
        alike.setdefault(tuple(sizes), []).append(name)
    for at, names in alike.items():
        have = "has" if len(names) == 1 else "have"
        told = shortened(names, names.index)
        clauses.append(f"{told} {have} no result {_where(at, everywhere=False)}")
    return clauses


def _where(batch_sizes: Sequence[int], everywhere: bool) -> str:
    if everywhere:
        return f"at every batch size ({enumerated(batch_sizes)})"
    plural = "s" if len(batch_sizes) > 1 else ""
    return f"at batch size{plural} {enumerated(batch_sizes)}"


def _nowhere(batch_sizes: Sequence[int], everywhere: bool) -> str:
    """`_where` after a negation."""
    if everywhere:
        return f"at any batch size ({enumerated(batch_sizes)})"
    plural = "s" if len(batch_sizes) > 1 else ""
    return f"at batch size{plural} {enumerated(batch_sizes, 'or')}"


def _values(values: Sequence[float], metric: Metric) -> str:
    low, high = formats.value(min(values), metric), formats.value(max(values), metric)
    if low == high:
        return low
    between = "–" if min(values) >= 0 else " to "
    return f"{formats.difference(min(values), metric)}{between}{high}"


def _named(value: str, metric: Metric) -> str:
    """A value that nothing else says the metric of: accuracy is what a percentage is taken for."""
    return value if metric == ACCURACY else f"{metric.name} {value}"


def _while(contest: Contest) -> str:
    """The end of a clause: who else is told apart. The highest mean may be the least certain."""
    apart = contest.apart()
    pairs = [f"{c.first} is ahead of {c.second}" for c in apart]
    if len(pairs) > _NAMED + 1:
        least = sorted(range(len(pairs)), key=lambda place: -abs(apart[place].difference))
        pairs = [pairs[place] for place in least[:_NAMED]]
        pairs.append(f"{len(apart) - _NAMED} other pairs are told apart")
    return f", while {enumerated(pairs)}" if pairs else ""


def _other(comparison: Comparison, name: str) -> str:
    return comparison.second if comparison.first == name else comparison.first
