"""The report's tables as CSV, with all digits: files inside the page, which stays one file."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence

from markupsafe import Markup

from fedkn.text import printable
from simulations.report.classes import ClassResults
from simulations.report.losses import LossLine
from simulations.report.summary import RunSummary, Section
from simulations.report.verdict import Contest

__all__ = ["csv_link", "losses_link", "section_links"]

Cell = str | int | float | None
Rows = Iterable[Sequence[Cell]]

# More of a confusion matrix of hundreds of classes would make the page too large to be sent.
_LARGEST = 300_000


def csv_link(run: str, name: str, header: Sequence[str], rows: Rows) -> Markup:
    """Return a link to the table as a file, empty where it would be too large for the page.

    What is no number is an empty cell; text of outside begins no formula of a spreadsheet.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    text = buffer.getvalue().encode()
    if len(text) > _LARGEST:
        return Markup()
    file = f"{re.sub('[^A-Za-z0-9]+', '-', f'{run}-{name}').strip('-').lower()}.csv"
    data = base64.b64encode(text).decode()
    return Markup('<a class="csv" download="{0}" href="data:text/csv;base64,{1}">{0}</a>').format(
        file, data
    )


def section_links(
    run: RunSummary, section: Section, classes: Sequence[ClassResults], names: Sequence[str]
) -> dict[str, Markup]:
    """Return by table of a section the link to its file."""
    tables: dict[str, tuple[Sequence[str], Rows]] = {
        "results": (_RESULTS, _results(section)),
        "by seed": (_BY_SEED, _by_seed(section)),
        "by round": (_BY_ROUND, _by_round(section)),
        "tests": (_TESTS, _tests(section.contests)),
        "own models": (_OWN, _own(section)),
        "own tests": (_TESTS, _tests(section.own_contests)),
        "learning rates": (_RATES, _rates(section)),
        "cost": (_COST, _cost(section)),
        "classes": (_CLASSES, _classes(classes, names)),
        "confusion": (_CONFUSION, _confusion(classes, names)),
    }
    label = f"{run.label} {section.label}" if len(run.sections) > 1 else run.label
    return {name: csv_link(label, name, *table) for name, table in tables.items()}


_RESULTS = (
    *("normalizer", "batch_size", "mean", "half_width", "seeds", "planned", "rounds_to_target"),
    "reached_target",
)


def _results(section: Section) -> Iterator[Sequence[Cell]]:
    for entry in section.entries.values():
        of = entry.accuracy
        yield (
            *(entry.normalizer, entry.batch_size, of.mean, of.half_width, of.n, entry.planned),
            *(entry.rounds.median, entry.rounds.reached),
        )


_BY_SEED = ("normalizer", "batch_size", "seed", "value", "own_models")


def _by_seed(section: Section) -> Iterator[Sequence[Cell]]:
    for entry in section.entries.values():
        own = entry.own.final if entry.own else {}
        for seed in sorted(entry.final.keys() | own.keys()):
            found = (entry.final.get(seed), own.get(seed))
            yield (entry.normalizer, entry.batch_size, seed, *found)


_BY_ROUND = ("normalizer", "batch_size", "seed", "round", "value", "loss", "train_loss")


def _by_round(section: Section) -> Iterator[Sequence[Cell]]:
    for entry in section.entries.values():
        for cell in entry.cells:
            split = cell.config.evaluation.split
            evaluated = {e.round: e for e in cell.evaluations if e.split == split}
            trained = {r.round: r.train_loss for r in cell.rounds}
            for number in sorted(evaluated.keys() | trained.keys()):
                of = evaluated.get(number)
                yield (
                    *(entry.normalizer, entry.batch_size, cell.config.seed, number),
                    *((of.value, of.loss) if of else (None, None)),
                    trained.get(number),
                )


_TESTS = (
    *("batch_size", "ahead", "behind", "difference", "half_width", "seeds", "p", "p_holm"),
    "detectable",
)


def _tests(contests: Sequence[Contest]) -> Iterator[Sequence[Cell]]:
    for contest in contests:
        for of in contest.comparisons:
            yield (
                *(contest.batch_size, of.first, of.second, of.difference, of.half_width, of.n),
                *(of.p, of.p_holm, of.detectable),
            )


_OWN = ("normalizer", "batch_size", "mean", "half_width", "seeds", "worst_tenth", "spread")


def _own(section: Section) -> Iterator[Sequence[Cell]]:
    for entry in section.entries.values():
        if of := entry.own:
            yield (
                *(entry.normalizer, entry.batch_size, of.accuracy.mean, of.accuracy.half_width),
                *(of.accuracy.n, of.worst_tenth, of.spread),
            )


_RATES = ("normalizer", "batch_size", "learning_rate", "value", "cells", "chosen", "own_models")


def _rates(section: Section) -> Iterator[Sequence[Cell]]:
    for (name, size), trials in section.trials.items():
        for of in trials:
            yield (
                *(name, size, of.learning_rate, of.accuracy, of.cells, int(of.chosen)),
                int(of.own),
            )


_COST = (
    *("normalizer", "batch_size", "engine", "ms_per_step", "peak_bytes", "bytes_down", "bytes_up"),
    "parameters",
)


def _cost(section: Section) -> Iterator[Sequence[Cell]]:
    for of in section.entries.values():
        yield (
            *(of.normalizer, of.batch_size, of.engine, of.ms_per_step, of.peak_bytes),
            *(of.bytes_down, of.bytes_up, of.parameters),
        )


_CLASSES = ("normalizer", "batch_size", "class", "metric", "mean", "half_width", "seeds")


def _classes(results: Sequence[ClassResults], names: Sequence[str]) -> Iterator[Sequence[Cell]]:
    for of in results:
        for metric, intervals in of.by_class.items():
            for name, interval in zip(names, intervals, strict=False):
                yield (
                    *(of.normalizer, of.batch_size, name, metric, interval.mean),
                    *(interval.half_width, interval.n),
                )


_CONFUSION = ("normalizer", "batch_size", "true_class", "predicted_class", "examples")


def _confusion(results: Sequence[ClassResults], names: Sequence[str]) -> Iterator[Sequence[Cell]]:
    """What was never predicted is left out."""
    for of in results:
        for name, row in zip(names, of.confusion, strict=False):
            for predicted, count in zip(names, row, strict=True):
                if count:
                    yield of.normalizer, of.batch_size, name, predicted, count


def losses_link(run: str, lines: Sequence[LossLine]) -> Markup:
    """Return the link to the table of losses."""
    header = ("what", "normalizer", "batch_size", "how_many", "why")
    return csv_link(
        run,
        "losses",
        header,
        ((of.what, of.normalizer, of.batch_size or None, of.amount, of.why) for of in lines),
    )


def _cell(value: Cell) -> str:
    if isinstance(value, str):
        text = printable(value, 1000)
        return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return repr(value)
