"""Why cells ended, by a flat curve or by the number of rounds, and what the other round would say.

Where validation examples choose (`evaluation.patience`, `checkpoint.best`), a cell's result is of
the round that was best on them, or of the last one. Both are told, on test examples: who looks at
the difference sees what the choice did.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from simulations.report.entries import Entry
from simulations.report.formats import count
from simulations.report.summary import RunSummary, Section
from simulations.report.verdict import enumerated
from simulations.runs.records import CellRecord
from simulations.runs.statistics import Interval, mean_interval

__all__ = [
    "Ending",
    "convergence",
    "ending_of",
    "endings",
    "not_converged",
    "until",
]


@dataclass(frozen=True)
class Ending:
    """How the completed cells of an entry ended; texts are by seed, in order.

    Attributes:
        last: rounds after which they ended. best: those that were best on validation examples.
        flat: cells with a flat curve. ran_out: those whose rounds ran out before; both 0 where
            nothing judged it.
        at_best, at_last: the metric on test examples after these rounds.
    """

    entry: Entry
    last: str
    best: str
    flat: int
    ran_out: int
    at_best: Interval
    at_last: Interval

    @property
    def why(self) -> str:
        """Why they ended, in words."""
        if not self.flat and not self.ran_out:
            return "all rounds were run"
        if not self.ran_out:
            return "flat"
        of = f"{self.ran_out} of {self.flat + self.ran_out}" if self.flat else "all"
        return f"not converged: rounds ran out ({of})"


def ending_of(entry: Entry) -> Ending | None:
    """Return how an entry's cells ended; None where validation examples chose nothing in any."""
    cells = [c for c in entry.cells if c.status == "completed" and c.last_round is not None]
    if not cells:
        return None
    return Ending(
        entry=entry,
        last=_listed(cell.last_round for cell in cells),
        best=_listed(cell.best_round for cell in cells),
        flat=sum(cell.flat is True for cell in cells),
        ran_out=sum(cell.flat is False for cell in cells),
        at_best=_after(entry, cells, [cell.best_round for cell in cells]),
        at_last=_after(entry, cells, [cell.last_round for cell in cells]),
    )


def endings(section: Section) -> list[Ending]:
    """Return how the cells of a section ended, entry by entry, where anything chose."""
    found = (ending_of(entry) for size in section.batch_sizes for entry in section.ranked(size))
    return [of for of in found if of is not None]


def until(patiences: Iterable[int]) -> str:
    """Return what ends a cell before its last round, in words; empty where nothing does."""
    some = sorted({patience for patience in patiences if patience})
    if not some:
        return ""
    evaluations = "evaluation" if some == [1] else "evaluations"
    return f"{enumerated(some, 'or')} {evaluations} on validation examples without a better one"


def not_converged(run: RunSummary) -> str:
    """Return in one sentence which cells' rounds ran out too soon; empty where none did."""
    late = _late(run.sections)
    if not late:
        return ""
    judged = sum(cell.flat is not None for cell in run.results)
    missing = sum(ran_out for ran_out, _ in late.values())
    names = [f"{name} ({ran_out} of {of})" for name, (ran_out, of) in late.items()]
    shown = names[:_SHOWN]
    if len(names) > len(shown):
        shown.append(f"{len(names) - len(shown)} more")
    were = "was" if missing == 1 else "were"
    return (
        f"Not converged: {missing} of {count(judged, 'result cell')} {were} still getting better "
        f"when the rounds ran out: {enumerated(shown)}. The order may change with more rounds"
    )


def convergence(run: RunSummary) -> list[str]:
    """Return whether the curves were flat when the cells ended, in sentences."""
    done = [cell for cell in run.results if cell.status == "completed"]
    judged = [cell for cell in done if cell.flat is not None]
    if not done:
        return []
    sentences = []
    criterion = until(cell.config.evaluation.patience for cell in judged)
    if judged:
        flat = sum(cell.flat is True for cell in judged)
        sentences.append(
            f"{flat} of {count(len(judged), 'result cell')} ended because the curve was flat: "
            f"{criterion}."
        )
    if late := not_converged(run):
        sentences.append(f"{late}.")
    if rest := len(done) - len(judged):
        rounds = sorted({cell.config.rounds for cell in done if cell.flat is None})
        sentences.append(
            f"Of {count(rest, 'result cell')} nothing judged whether the curve was flat "
            f"(evaluation.patience is 0): all of the {enumerated(rounds, 'or')} rounds were run, "
            "and the figures are those of that much training, not of convergence."
        )
    tried = [cell for cell in run.cells if cell.purpose == "search" and cell.flat is not None]
    if tried:
        flat = sum(cell.flat is True for cell in tried)
        sentences.append(
            f"Of the {count(len(tried), 'cell')} that tried learning rates {flat} ended flat."
        )
    return sentences


_SHOWN = 6


def _listed(numbers: Iterable[int | None]) -> str:
    return ", ".join("–" if number is None else str(number) for number in numbers)


def _after(entry: Entry, cells: Sequence[CellRecord], rounds: Sequence[int | None]) -> Interval:
    values = [
        cell.values(cell.config.evaluation.split).get(number or 0, math.nan)
        for cell, number in zip(cells, rounds, strict=True)
    ]
    metric = entry.metric
    return mean_interval(
        [value for value in values if math.isfinite(value)], metric.lowest, metric.highest
    )


def _late(sections: Sequence[Section]) -> Mapping[str, tuple[int, int]]:
    """By normalizer and batch size how many cells' rounds ran out before the curve was flat.

    And of how many cells that were judged, in all sections; without those of which none did.
    """
    found: dict[str, tuple[int, int]] = {}
    for of in (of for section in sections for of in endings(section)):
        name = f"{of.entry.normalizer} at batch size {of.entry.batch_size}"
        late, judged = found.get(name, (0, 0))
        found[name] = late + of.ran_out, judged + of.flat + of.ran_out
    return {name: counts for name, counts in found.items() if counts[0]}
