"""The answers of many runs, in plain sentences: who is best where, and where nobody can tell."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from simulations.overview.reproduced import Reproduced
from simulations.report import formats
from simulations.report.endings import not_converged
from simulations.report.summary import RunSummary, Section
from simulations.report.verdict import Contest, enumerated
from simulations.runs.statistics import FEWEST_SEEDS, Interval

__all__ = ["Answer", "of_study", "of_table", "published_sentences", "sentences"]


@dataclass(frozen=True)
class Answer:
    """Who is best in one setting: all but what is compared is equal there.

    Attributes:
        where: the setting in words. contest: what competes.
        best: the best mean with its interval. notes: what the figures leave out.
        compared: what competes, in the plural: normalizers, or rows.
    """

    where: str
    contest: Contest
    best: Interval
    notes: list[str]
    compared: str

    @property
    def winner(self) -> str:
        """Who has the best mean; empty where nobody has a result."""
        return self.contest.winner

    @property
    def alone(self) -> bool:
        """Whether there is nothing to compare it with."""
        return len(self.contest.means) == 1

    @property
    def figure(self) -> str:
        """The best mean and its interval in its spelling."""
        return formats.interval(self.best, self.contest.metric)

    @property
    def level(self) -> list[str]:
        """Who the tests cannot tell apart from the winner, the best first; tested or not."""
        return self._ordered(self.contest.level())

    @property
    def behind(self) -> list[str]:
        """Who the tests tell apart from it, the best first."""
        return self._ordered(self.contest.behind())

    @property
    def outcome(self) -> str:
        """What the tests say, in a few words."""
        if not self.winner:
            return "no result"
        if self.alone:
            return "alone: nothing to compare"
        if not self.contest.tested:
            return f"not tested: fewer than {FEWEST_SEEDS} common seeds"
        if not self.level:
            return "ahead of all others"
        return "ahead of some" if self.behind else "cannot be told apart from any"

    def _ordered(self, names: Iterable[str]) -> list[str]:
        means, sign = self.contest.means, self.contest.metric.sign
        return sorted(names, key=lambda name: -sign * means[name])


def of_study(run: RunSummary) -> list[Answer]:
    """Return the answers of a comparison, section by section and batch size by batch size."""
    found = []
    for section in run.sections:
        for contest in section.contests:
            best = section.entries.get((contest.winner, contest.batch_size))
            interval = best.accuracy if best else Interval(math.nan, math.nan, 0)
            notes = _notes(section, contest)
            if contest.means or contest.untrained:
                found.append(_answer(section, contest, interval, notes, own=False))
        for contest in section.own_contests:
            best = section.entries.get((contest.winner, contest.batch_size))
            if best and best.own:
                found.append(_answer(section, contest, best.own.accuracy, [], own=True))
    return found


def of_table(table: Reproduced) -> list[Answer]:
    """Return the answers of a published table's rows, where they can be compared."""
    return [
        Answer(
            where=of.held.label,
            contest=of.contest,
            best=of.intervals[of.contest.winner],
            notes=[],
            compared="rows",
        )
        for of in table.contests
        if len(of.contest.means) > 1
    ]


def sentences(answers: Sequence[Answer], runs: Sequence[RunSummary] = ()) -> list[str]:
    """Return what all answers come to, the best means first; empty where there is none.

    `runs` are those that may not have converged.
    """
    contested = [of for of in answers if len(of.contest.means) > 1]
    if not contested:
        return []
    text = [_best_means([of.winner for of in contested])]
    tested = [of for of in contested if of.contest.tested]
    if tested:
        text += _of_tests(tested, all_of_them=len(tested) == len(contested))
    if untested := len(contested) - len(tested):
        those = (
            f"In {untested} of them" if tested else "There" if untested == 1 else "In none of these"
        )
        are = "are at least" if those.startswith("In none") else "are fewer than"
        text.append(
            f"{those} {are} {FEWEST_SEEDS} common seeds for a test: which of the "
            f"{contested[0].compared} is better cannot be told there, whatever the means are."
        )
    if late := [run.label for run in runs if not_converged(run)]:
        text.append(
            f"In {enumerated(late)} some curves were not flat when the rounds ran out: the order "
            "may change there with more rounds."
        )
    return text


def published_sentences(table: Reproduced) -> list[str]:
    """Return how a table's figures stand to the published ones."""
    of, reading = table.of.table, table.of.table.reading
    run = [line for line in table.lines if line.outcome.best.n]
    text = [f"{len(run)} of {len(table.lines)} rows have results."]
    judged = [inside for line in run if (inside := line.inside(reading)) is not None]
    if judged:
        text.append(
            f"Of {formats.count(len(judged), 'published figure')} beside an interval of ours, "
            f"{sum(judged) or 'none'} lie{'s' if sum(judged) < 2 else ''} within it."
        )
    agreement = table.agreement()
    if agreement.pairs:
        order = f"{agreement.same} of {formats.count(agreement.pairs, 'pair')} of rows"
        text.append(f"The published order is ours in {order}.")
        if agreement.apart:
            text.append(
                f"Of the {agreement.apart} pairs that our tests tell apart, {agreement.apart_same} "
                "are in the published order."
            )
    if any(line.published is None and line.outcome.row.published is not None for line in run):
        text.append("These are not the paper's images: its figures are of another task.")
    elif not any(row.published is not None for row in of.rows):
        text.append("No published figure is at hand.")
    if table.of.scale == "small" and run:
        text.append(
            "At the small scale a part of the paper's training is run: its figures are neither met "
            "nor missed by it."
        )
    return text


def _answer(
    section: Section, contest: Contest, best: Interval, notes: list[str], *, own: bool
) -> Answer:
    where = f"{section.label}, batch size {contest.batch_size}"
    if own:
        where += ", clients' own models"
    return Answer(where, contest, best, notes, "normalizers")


def _notes(section: Section, contest: Contest) -> list[str]:
    notes = [f"{name} has no result" for name in contest.untrained]
    notes += [
        f"{name} lacks {formats.count(lost, 'cell')}"
        for name, lost in contest.lost.items()
        if name not in contest.untrained
    ]
    if section.keepers:
        notes.append(f"{enumerated(section.keepers)}: see the clients' own models")
    entries = [e for e in section.entries.values() if e.batch_size == contest.batch_size]
    if missing := sum(entry.planned - entry.ended for entry in entries):
        notes.append(f"{formats.count(missing, 'cell')} still to come")
    late = [e.normalizer for e in entries if any(cell.flat is False for cell in e.cells)]
    if late:
        notes.append(f"not converged: {enumerated(late)}")
    return notes


def _best_means(winners: Sequence[str]) -> str:
    if len(winners) == 1:
        return f"In the one setting compared {winners[0]} has the best mean."
    (first, most), *others = Counter(winners).most_common()
    if not others:
        every = "both" if len(winners) == 2 else f"all {len(winners)}"
        return f"In {every} settings {first} has the best mean."
    rest = [f"{name} in {number}" for name, number in others]
    return (
        f"Of {len(winners)} settings {enumerated([f'{first} has the best mean in {most}', *rest])}."
    )


def _of_tests(tested: Sequence[Answer], *, all_of_them: bool) -> list[str]:
    """What the tests say over all settings that have any."""
    alone = Counter(of.winner for of in tested if not of.level)
    where = "By the tests"
    if not all_of_them:
        where += f" of {formats.count(len(tested), 'setting')}"
    if alone:
        who = enumerated([f"{name} in {number}" for name, number in alone.most_common()])
        text = [f"{where}, one is ahead of all others in {alone.total()}: {who}."]
    else:
        text = [f"{where}, nobody is ahead of all others."]
    level = sum(not of.behind and not of.contest.apart() for of in tested)
    if level == len(tested):
        text.append("No two can be told apart.")
    elif level:
        text.append(f"In {level} no two can be told apart.")
    if behind := Counter(name for of in tested for name in of.behind):
        text.append(f"Told apart as behind the best mean: {_listed(behind)}.")
    return text


def _listed(counts: Counter[str]) -> str:
    return enumerated([f"{name} in {number}" for name, number in counts.most_common()])
